"""A term of your own in the score of candidates, in one file: `python examples/own_term.py`.

A rule that compares candidate topologies takes the one with the lowest score, a weighted sum of terms. This term is how
unevenly inputs are spread over a layer's neurons. A run takes it by name:

    SPARSAE_IMPORT=examples/own_term.py sparsae train --method sparsae-guided \
        --set topology.proxy.terms.fan_in_spread.weight=0.1

docs/own-term.md tells the rest, and how a package of yours brings it along.
"""

import torch
from pydantic import Field
from torch import nn

from sparsae import TERMS, AdamW, Sparsifier, SparsifierConfig, Term, TermConfig, Trial, sparsify
from sparsae.rules import EvolutionConfig


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


def main() -> None:
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
    for step in range(200):
        loss = loss_on(torch.randn(64, 32))
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        if update := sparsifier.after_step():
            spreads = [round(candidate["fan_in_spread"], 4) for candidate in update.row["candidates"]]
            assert "diversity" not in update.row["current"]
            print(f"step {step + 1}: spread of the candidates {spreads}, taken: number {update.row['chosen']}")


if __name__ == "__main__":
    main()
