"""Weights & Biases, which keeps its files with the run."""

from __future__ import annotations

from pathlib import Path

from sparsae.observers import OBSERVERS, Observer
from sparsae.observers.parts.tracking import identity_of, numbers_of, package, started, told_before
from sparsae.runs.rows import Row


@OBSERVERS.register("wandb")
class WeightsAndBiases(Observer):
    """Logs to Weights & Biases, where a run that is resumed goes on as the same one; WANDB_MODE=offline works."""

    def __init__(self, run: Path) -> None:
        self._tracker = started("wandb", run, dir=str(run), id=identity_of(run))

        self._told = told_before(run)

    @classmethod
    def require(cls) -> None:
        """See `Observer`."""
        package("wandb", "wandb")

    def observe(self, row: Row) -> None:
        """See `Observer`."""
        if (row.kind, row.step) not in self._told:
            self._tracker.log(numbers_of(row), step=row.step)

    def end(self) -> None:
        """See `Observer`."""
        self._tracker.finish()
