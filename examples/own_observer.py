# %% [markdown]
"""# An observer of your own

An observer of your own, in one file: it sees every row of a run's metrics while the run trains.

This one keeps the best validation so far in `best.json` beside the run's other files. A run takes it by name, and
`python examples/own_observer.py` makes such a run:

    SPARSAE_IMPORT=examples/own_observer.py sparsae train --set 'tracking.observers=[best]'

docs/own-observer.md tells the rest, and how a package of yours brings it along.
"""

# %%
import json
import math
import tempfile
from pathlib import Path

from sparsae import OBSERVERS, Observer
from sparsae.runs.rows import Row

# %% [markdown]
# What it does with a row.


# %%
@OBSERVERS.register("best")
class Best(Observer):
    """Writes down the lowest validation loss, and where it was."""

    def __init__(self, run: Path) -> None:
        self.file = run / "best.json"
        # A run that was stopped is resumed, and so is its observer, with what it wrote down.
        self.loss = json.loads(self.file.read_text())["loss"] if self.file.exists() else math.inf

    def observe(self, row: Row) -> None:
        if row.kind == "validation" and row.loss < self.loss:
            self.loss = row.loss
            self.file.write_text(json.dumps({"step": row.step, "loss": row.loss}))


# %% [markdown]
# A run of the program that names it, and what it has left there.


# %%
def main() -> None:
    from sparsae.config.load import resolve
    from sparsae.train.run import start

    settings = [
        "model={layers: 1, width: 32, heads: 2, context: 32}",
        "data={max_documents: 10, tokenizer_vocab: 300}",
        "training={steps: 30, batch_size: 4, validation_sequences: 8}",
        "tracking.observers=[best]",
    ]
    with tempfile.TemporaryDirectory() as folder:
        summary = start(resolve(overrides=settings), Path(folder) / "run", quiet=True)
        best = json.loads((Path(folder) / "run" / "best.json").read_text())
    print(f"best validation loss {best['loss']:.4f} at step {best['step']}")
    assert best["loss"] <= summary["validation_loss"]


# %%
if __name__ == "__main__":
    main()
