"""Small models and their settings, optimizers, and a loop such as anybody writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.core.randomness import generator
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.optim import AdamW, parameter_groups
from sparsae.registry import RULES
from sparsae.search.sparsifier import Sparsifier
from sparsae.train.model import model_of


def mlp(width: int = 24, sparsity: float = 0.8, unit: tuple[int, int] = (1, 1)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    return sparsify(model, sparsity, unit=unit, seed=1)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, steps: int) -> list[float]:
    losses = []
    width = next(iter(sparse_layers(model).values())).in_features
    for _ in range(steps):
        x = torch.randn(8, width, generator=generator(5, "x", sparsifier.step))
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        losses.append(float(loss.detach()))
    return losses


def frequent(rule: str, every: int) -> dict[str, Any]:
    """Settings under which a registered rule has updates in a short training."""
    return {"every": every} if "every" in RULES[rule].settings.model_fields else {}


def score_of(model: nn.Module) -> object:
    def score(step: int) -> Tensor:
        x = torch.randn(
            8, next(iter(sparse_layers(model).values())).in_features, generator=generator(9, "held out", step)
        )
        return (model(x) - x.roll(1, 1)).square().mean()

    return score


OPTIMIZERS = {
    "ours": lambda model: AdamW(parameter_groups(model, 0.1), lr=3e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
}


def config_of(*overrides: str, method: str = "static") -> Config:
    settings = ["model.width=64", "model.layers=2", "model.heads=4", "model.context=24", "training.device=cpu"]
    return resolve(None, "demo", method, [*settings, "data.tokenizer_vocab=300", *overrides])


def built(config: Config) -> Any:
    return model_of(config, 300, 0, torch.device("cpu")).eval()


SUPAR = ["parameterization.name=supar", "parameterization.base_width=16"]
LLAMA = ["model.family=llama", "model.kv_heads=2", "model.mlp_width=256"]
