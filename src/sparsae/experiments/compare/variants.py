"""Experiments that are known by name: what is taken from a method, and how its micro-batch is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsae.config.complaints import nearest, shown
from sparsae.config.load import resolve
from sparsae.errors import InputError

WRITTEN = "sparsae-written"
MODES = ("static", "resampled", "pooled")

# Method -> name -> settings on top of the method's; the first is the method itself. Naming another rule starts the
# section `topology` anew, and leaves the method's teacher as it is.
ABLATIONS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "sparsae": {
        "sparsae": {},
        "no-updates": {"topology": {"rule": "static"}},
        "no-ramp": {"topology": {"ramp": 0}},
        "ramp-of-two": {"topology": {"ramp": "2 updates"}},
        "no-random-growth": {"topology": {"random_share": 0.0}},
        "half-random-growth": {"topology": {"random_share": 0.5}},
        "averaged-growth": {"topology": {"random_share": 0.0, "window": 10, "window_every": 2}},
        "no-stop": {"topology": {"stop": 1.0}},
        "uniform": {"sparsity": {"budget": "uniform"}},
        "dense-first": {"sparsity": {"density": {"depth": [1.5, 1.0, 0.5]}}},
        "dense-attention": {"sparsity": {"density": {"attention": 1.6, "mlp": 0.7}}},
        "bump": {"sparsity": {"schedule": {"kind": "bump"}}},
        "teacher": {"teacher": {"enabled": True, "share": 0.25, "start": 0.5}},
    },
    WRITTEN: {
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
    },
}


def ablation_variants(method: str, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The named ablations of a method (all, where no names are given) as the variants of a plan.

    Raises InputError for a method that has none, and for an unknown name.
    """
    if method not in ABLATIONS:
        raise InputError(f"--method: no ablations of {shown(method)}; {nearest(method, ABLATIONS)}")
    parts = ABLATIONS[method]
    for name in names or ():
        if name not in parts:
            raise InputError(f"--variants: no ablation {shown(name)} of {method}; {nearest(name, parts)}")
    return {name: {"method": method, "settings": parts[name]} for name in names or parts}


def sensitivity_variants(method: str, sequences: Sequence[int], modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A variant for each size and mode of the micro-batch, whose candidates are also scored on all validation text.

    Raises InputError for a method whose rule has no micro-batch.
    """
    rule = resolve(None, "tiny", method).topology
    if "micro_batch" not in type(rule).model_fields or not getattr(rule, "compares", True):
        raise InputError(
            f"--method: {method} compares no candidates on held-out text; one that does is sparsae-guided or {WRITTEN}"
        )
    return {
        f"{mode}-{count}": {
            "method": method,
            "settings": {"topology": {"micro_batch": {"sequences": count, "mode": mode, "study": True}}},
        }
        for mode in modes
        for count in sequences
    }
