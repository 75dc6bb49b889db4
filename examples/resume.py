# %% [markdown]
"""# Stop and resume

Stop a training and resume it as if it had never stopped, bit for bit: `python examples/resume.py`.

A checkpoint has three parts: model, optimizer and Sparsifier, which brings its teacher along. They are loaded in that
order. (`sparsae train --resume RUN` does all this by itself, for runs of the program.)
"""

# %%
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparsify

STEPS, STOP = 120, 50

# %% [markdown]
# Model, optimizer and Sparsifier, and how they are saved and loaded.


# %%
@dataclass
class Training:
    """Everything that a training consists of, and its step."""

    model: nn.Module
    optimizer: AdamW
    sparsifier: Sparsifier
    losses: dict[int, float] = field(default_factory=dict)

    @classmethod
    def new(cls) -> "Training":
        torch.manual_seed(0)
        model = sparsify(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)), sparsity=0.9)
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3)
        return cls(model, optimizer, Sparsifier(model, optimizer, SparsifierConfig(steps=STEPS)))

    def run(self, until: int) -> None:
        """Train up to a step. The data of a step is a function of the step, so that it can be resumed."""
        while self.sparsifier.step < until:
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(self.sparsifier.step))
            loss = (self.model(x) - x.roll(1, 1)).square().mean()
            self.losses[self.sparsifier.step] = loss.item()
            self.optimizer.zero_grad()
            loss.backward()
            self.sparsifier.before_step()
            self.optimizer.step()
            self.sparsifier.after_step()

    @property
    def parts(self) -> tuple[nn.Module, AdamW, Sparsifier]:
        return self.model, self.optimizer, self.sparsifier

    def save(self, file: Path) -> None:
        torch.save([part.state_dict() for part in self.parts], file)

    def load(self, file: Path) -> None:
        for part, state in zip(self.parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


# %% [markdown]
# One training without a stop, one that is stopped and resumed, and their weights beside each other.


# %%
def main() -> tuple[Training, Training]:
    unbroken = Training.new()
    unbroken.run(STEPS)

    with tempfile.TemporaryDirectory() as folder:
        stopped = Training.new()
        stopped.run(STOP)
        stopped.save(Path(folder) / "checkpoint.pt")

        resumed = Training.new()
        resumed.load(Path(folder) / "checkpoint.pt")
    resumed.run(STEPS)

    ours, theirs = resumed.model.state_dict(), unbroken.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    print(f"stopped at step {STOP} and resumed to step {STEPS}: the same {len(theirs)} tensors, bit for bit")
    return unbroken, resumed


# %%
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for training, label, style in zip(main(), ("without a stop", "resumed"), ("-", "--"), strict=True):
        axes.plot(*zip(*training.losses.items(), strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    plt.show()
