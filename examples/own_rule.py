# %% [markdown]
"""# A topology rule of your own

A topology rule of your own, in one file: `python examples/own_rule.py`.

The rule drops small weights, but not exactly the smallest: noise decides between weights of similar size. A run takes
it by name:

    SPARSAE_IMPORT=examples/own_rule.py sparsae train --method noisy --steps 60

docs/own-rule.md tells the rest, and how a package of yours brings it along.
"""

# %%
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

# %% [markdown]
# Its settings. The first line is what `sparsae methods` says of it, and each description is in the lists of settings.


# %%
class NoisyConfig(RuleConfig):
    """Small weights are dropped with noise, random ones grown."""

    every: Span = Field(default="5%", description="between updates: steps, 5%, 1 epoch")
    drop_fraction: float = Field(default=0.3, ge=0, le=1, description="share of a layer that moves first; cosine decay")
    temperature: float = Field(
        default=0.5, ge=0, description="size of the noise on log |w|; 0: exactly the smallest are dropped"
    )


# %% [markdown]
# What is new about it: the scores by which connections are dropped.


# %%
class NoisyMagnitude(Drop):
    """What has the lowest score is dropped. Randomness comes from `rng` alone, so that a run can be repeated."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def scores(self, view: LayerView, rng: torch.Generator) -> torch.Tensor:
        noise = torch.randn(view.magnitude.shape, generator=rng)
        return (view.magnitude + 1e-12).log() + self.temperature * noise


# %% [markdown]
# The rest is made of parts that there are, and gets a name.


# %%
@RULES.register("noisy", NoisyConfig)
def build(config: NoisyConfig) -> Exchange:
    when, fraction = Periodic(config.every, stop=0.75), CosineFraction(config.drop_fraction, stop=0.75)
    drop = NoisyMagnitude(config.temperature)
    return Exchange("noisy", when=when, fraction=fraction, drop=drop, grow=RandomGrowth())


# %% [markdown]
# A small network that learns to shift its input, by the rule with and without noise.


# %%
def train(topology: NoisyConfig, steps: int = 200) -> list[float]:
    """Trains with the rule; returns the losses."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)), sparsity=0.9)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=steps, topology=topology))
    moved, losses = 0, []
    for _ in range(steps):
        x = torch.randn(64, 32)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        losses.append(loss.item())
        if update := sparsifier.after_step():
            moved += update.row["swaps"]
    assert moved > 0
    print(f"temperature {topology.temperature}: {moved} connections moved, loss {loss.item():.3f}")
    return losses


# %%
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for temperature in (0.0, 0.5):
        axes.plot(train(NoisyConfig(temperature=temperature)), label=f"temperature {temperature}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    plt.show()
