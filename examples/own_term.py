# %% [markdown]
"""# A term of your own

A term of your own in the score of candidates, in one file: `python examples/own_term.py`.

A rule that compares candidate topologies takes the one with the lowest score, a weighted sum of terms. This term is how
unevenly inputs are spread over a layer's neurons. A run takes it by name:

    SPARSAE_IMPORT=examples/own_term.py sparsae train --method sparsae-guided \
        --set topology.proxy.terms.fan_in_spread.weight=0.1

docs/own-term.md tells the rest, and how a package of yours brings it along.
"""

# %%
from typing import Any

import torch
from pydantic import Field
from torch import nn

from sparsae import TERMS, AdamW, Sparsifier, SparsifierConfig, Term, TermConfig, Trial, sparsify
from sparsae.rules import EvolutionConfig

# %% [markdown]
# Its settings, and the term: one number of a topology as it would be.


# %%
class FanInSpreadConfig(TermConfig):
    """Deviation of the number of inputs of a neuron, in terms of the mean."""

    weight: float = Field(default=1.0, ge=0, description="weight of the spread of inputs over neurons; lower is better")


@TERMS.register("fan_in_spread", FanInSpreadConfig)
class FanInSpread(Term):
    label, unit = "Spread of fan-in", "share of the mean"

    def value(self, trial: Trial) -> float:
        """The mean over layers; `trial` has the topologies as they would be."""
        spreads = []
        for topology in trial.topologies.values():
            inputs = torch.bincount(topology.rows, minlength=topology.grid[0]).float()
            spreads.append(float(inputs.std(correction=0) / inputs.mean()))
        return sum(spreads) / len(spreads)


# %% [markdown]
# A network that learns to shift its input. Candidates are scored by a loss on held-out data, and by the term.


# %%
def train() -> list[dict[str, Any]]:
    """Returns a row of each update."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)), sparsity=0.95)
    optimizer = AdamW(model.parameters(), lr=3e-3)

    def loss_on(x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x.roll(1, 1)).square().mean()

    def held_out_loss(step: int) -> torch.Tensor:
        """What candidates are compared by: the same data for the same step."""
        return loss_on(torch.randn(64, 32, generator=torch.Generator().manual_seed(step)))

    proxy = {"terms": {"fan_in_spread": {"weight": 0.1}, "diversity": None}}
    topology = EvolutionConfig.model_validate(
        {"every": 25, "proposer": "uniform", "mutation_rate": 0.05, "proxy": proxy}
    )
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=200, topology=topology), score=held_out_loss)
    rows = []
    for step in range(200):
        loss = loss_on(torch.randn(64, 32))
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        if update := sparsifier.after_step():
            spreads = [round(candidate["fan_in_spread"], 4) for candidate in update.row["candidates"]]
            assert "diversity" not in update.row["current"]
            rows.append(update.row)
            print(f"step {step + 1}: spread of the candidates {spreads}, taken: number {update.row['chosen']}")
    return rows


# %% [markdown]
# The spread of each update's candidates, and of those that were taken.

# %%
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for row in train():
        spreads = [candidate["fan_in_spread"] for candidate in row["candidates"]]
        axes.scatter([row["step"]] * len(spreads), spreads, color="0.6")
        if row["chosen"] is not None:
            axes.scatter(row["step"], spreads[row["chosen"]], color="C0")
    axes.set(xlabel="step", ylabel="spread of fan-in")
    plt.show()
