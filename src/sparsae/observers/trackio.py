"""trackio: one database on this machine has all runs."""

from __future__ import annotations

from pathlib import Path

from sparsae.observers import OBSERVERS, Observer
from sparsae.observers.parts.tracking import identity_of, numbers_of, package, started, told_before
from sparsae.runs.rows import Row


@OBSERVERS.register("trackio")
class Trackio(Observer):
    """Logs to trackio, where a run that is resumed goes on as the same one."""

    def __init__(self, run: Path) -> None:
        # It knows a run by its name, which those of other folders may have too.
        self._tracker = started("trackio", run, name=f"{run.name}-{identity_of(run)[:8]}")

        self._told = told_before(run)

    @classmethod
    def require(cls) -> None:
        """See `Observer`."""
        package("trackio", "trackio")

    def observe(self, row: Row) -> None:
        """See `Observer`."""
        if (row.kind, row.step) not in self._told:
            self._tracker.log(numbers_of(row), step=row.step)

    def end(self) -> None:
        """See `Observer`."""
        self._tracker.finish()
