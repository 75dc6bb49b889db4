"""A topology rule of your own, in one file: `python examples/own_rule.py`.

The rule drops small weights, but not exactly the smallest: noise decides between weights of similar size. A run takes
it by name:

    SPARSAE_IMPORT=examples/own_rule.py sparsae train --method noisy --steps 60

docs/own-rule.md tells the rest, and how a package of yours brings it along.
"""

import torch
from pydantic import Field
from torch import nn

from sparsae import (
    RULES,
    AdamW,
    CosineFraction,
    Drop,
    Exchange,
    LayerView,
    Periodic,
    RandomGrowth,
    RuleConfig,
    Span,
    Sparsifier,
    SparsifierConfig,
    sparsify,
)


class NoisyConfig(RuleConfig):
    """Small weights are dropped with noise, random ones grown."""

    every: Span = Field(default="5%", description="between updates: steps, 5%, 1 epoch")
    drop_fraction: float = Field(default=0.3, ge=0, le=1, description="share of a layer that moves first; cosine decay")
    temperature: float = Field(
        default=0.5, ge=0, description="size of the noise on log |w|; 0: exactly the smallest are dropped"
    )


class NoisyMagnitude(Drop):
    """What has the lowest score is dropped. Randomness comes from `rng` alone, so that a run can be repeated."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def scores(self, view: LayerView, rng: torch.Generator) -> torch.Tensor:
        noise = torch.randn(view.magnitude.shape, generator=rng)
        return (view.magnitude + 1e-12).log() + self.temperature * noise


@RULES.register("noisy", NoisyConfig)
def build(config: NoisyConfig) -> Exchange:
    when, fraction = Periodic(config.every, stop=0.75), CosineFraction(config.drop_fraction, stop=0.75)
    drop = NoisyMagnitude(config.temperature)
    return Exchange("noisy", when=when, fraction=fraction, drop=drop, grow=RandomGrowth())


def train(topology: NoisyConfig, steps: int = 200) -> int:
    """Trains a small network to shift its input; returns how many connections moved."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)), sparsity=0.9)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=steps, topology=topology))
    moved = 0
    for _ in range(steps):
        x = torch.randn(64, 32)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        if update := sparsifier.after_step():
            moved += update.row["swaps"]
    print(f"temperature {topology.temperature}: {moved} connections moved, loss {loss.item():.3f}")
    return moved


if __name__ == "__main__":
    assert train(NoisyConfig(temperature=0.0)) > 0
    assert train(NoisyConfig(temperature=0.5)) > 0
