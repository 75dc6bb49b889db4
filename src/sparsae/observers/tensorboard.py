"""TensorBoard events beside the run's other files."""

from __future__ import annotations

from pathlib import Path

from sparsae.observers import OBSERVERS, Observer
from sparsae.observers.parts.tracking import numbers_of, package
from sparsae.runs.rows import Row


@OBSERVERS.register("tensorboard")
class TensorBoard(Observer):
    """Writes the folder `tensorboard` of a run."""

    def __init__(self, run: Path) -> None:
        self._writer = package("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))

    @classmethod
    def require(cls) -> None:
        """See `Observer`."""
        package("torch.utils.tensorboard", "tensorboard")

    def observe(self, row: Row) -> None:
        """See `Observer`."""
        for name, number in numbers_of(row).items():
            self._writer.add_scalar(name, number, row.step)

    def end(self) -> None:
        """See `Observer`."""
        self._writer.close()
