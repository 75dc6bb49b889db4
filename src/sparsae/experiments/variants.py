"""Experiments that are known by name: what is taken from the written method, and how its micro-batch is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WRITTEN = "sparsae-written"
MODES = ("static", "resampled", "pooled")

# Name -> settings on top of the written method's. Naming another rule starts the section `topology` anew, and leaves
# the written method's teacher as it is.
ABLATIONS: Mapping[str, dict[str, Any]] = {
    "written": {},
    "no-evolution-static": {"topology": {"rule": "static"}},
    "no-evolution-rigl": {"topology": {"rule": "rigl"}},
    "no-evolution-magnitude": {"topology": {"rule": "set"}},
    "no-teacher": {"teacher": {"enabled": False}},
    "no-burn-in": {"topology": {"burn_in": {"steps": 0}}},
    "no-reset": {"topology": {"reset": {"probability": 0.0, "boosted_probability": 0.0}}},
    "standardized": {"topology": {"proxy": {"standardize": True}}},
    "annealed": {"topology": {"proxy": {"anneal": "cosine"}}},
    "standardized-annealed": {"topology": {"proxy": {"standardize": True, "anneal": "cosine"}}},
    "activity-training": {"topology": {"proxy": {"terms": {"activity": {"source": "training"}}}}},
    "activity-moments": {"topology": {"proxy": {"terms": {"activity": {"source": "moments"}}}}},
}


def ablation_variants(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named ablations as the variants of a plan."""
    return {name: {"method": WRITTEN, "settings": ABLATIONS[name]} for name in names}


def sensitivity_variants(method: str, sequences: Sequence[int], modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A variant for each size and mode of the micro-batch, whose candidates are also scored on all validation text."""
    return {
        f"{mode}-{count}": {
            "method": method,
            "settings": {"topology": {"micro_batch": {"sequences": count, "mode": mode, "study": True}}},
        }
        for mode in modes
        for count in sequences
    }
