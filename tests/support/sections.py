"""Settings under which every rule moves in a few steps, and what is trained with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsae.config import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.registry import RULES
from sparsae.rules import build_rule
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import frequent, mlp, score_of

SECTIONS: dict[str, dict[str, Any]] = {
    **{name: frequent(name, 2) for name in RULES.names() if build_rule(RULES[name].settings()).moves},
    "rigl, sum": {"every": 2, "accumulate": "sum"},
    "gse, graest": {"every": 2, "sampling": "graest"},
    "gse, local": {"every": 2, "scope": "local"},
    "gmp": {"every": 2, "start": 0.0},
    "granet": {"every": 2, "start": 0.0},
    "magnitude": {"at": 0.1},
    "evolution, guided": {"every": 2, "proposer": "guided"},
    "evolution, rigl": {"every": 2, "proposer": "rigl"},
    "evolution, elitist": {
        "every": 2,
        "selection": "elitist",
        "candidates": 2,
        "proxy": {"terms": {"activity": {"source": "candidate"}}},
    },
}
# Any rule that is not here yet, with the settings that make it move in a few steps where it has them.
_FIRST = {name.partition(",")[0] for name in SECTIONS} | {"static"}
SECTIONS |= {
    name: {key: 2 for key in ("every",) if key in RULES[name].settings.model_fields}
    for name in RULES.own_names()
    if name not in _FIRST
}


def made(
    section: str = "rigl", steps: int = 20, unit: tuple[int, int] = (1, 1), **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    rule = section.partition(",")[0]
    plain = SECTIONS.get(section, {}) | settings
    model = mlp(unit=unit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    topology = _config(rule, plain)
    config = SparsifierConfig(steps=steps, topology=topology, sparsity=0.9 if build_rule(topology).prunes else None)
    score = score_of(model) if "elitist" in section else None
    return model, optimizer, Sparsifier(model, optimizer, config, score=score)  # type: ignore[arg-type]


def _config(rule: str, plain: dict[str, Any]) -> RuleConfig:
    return SparsifierConfig.model_validate({"steps": 1, "topology": {"rule": rule, **plain}}).topology


def backward(model: nn.Module, seed: int, poison: float | None = None) -> None:
    """Gradients of a batch; `poison` scales the loss, as a scaler's overflow does."""
    loss = (model(torch.randn(8, 24, generator=generator(seed, "x"))) - 1.0).square().mean()
    (loss if poison is None else loss * poison).backward()
