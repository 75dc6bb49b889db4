"""TensorBoard events beside the run's other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsae.observers import OBSERVERS, Observer, Standing
from sparsae.observers.parts.tracking import numbers_of, package
from sparsae.runs.rows import Row


@OBSERVERS.register("tensorboard")
class TensorBoard(Observer):
    """Writes the folder `tensorboard` of a run."""

    def __init__(self, run: Path) -> None:
        self._make = package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder = str(run / "tensorboard")
        self._writer: Any = None

    def begin(self, standing: Standing) -> None:
        """What was written of steps after a checkpoint, which are made once more, is shown no more."""
        self._writer = self._make(self._folder, purge_step=standing.step + 1 if standing.step else 0)

    @classmethod
    def require(cls) -> None:
        """See `Observer`."""
        package("torch.utils.tensorboard", "tensorboard")

    def observe(self, row: Row) -> None:
        """See `Observer`."""
        assert self._writer is not None
        for name, number in numbers_of(row).items():
            self._writer.add_scalar(name, number, row.step)

    def end(self) -> None:
        """See `Observer`."""
        if self._writer is not None:
            self._writer.close()
