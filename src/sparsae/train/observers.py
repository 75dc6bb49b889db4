"""Who looks at a run while it goes on: the metrics file, the display, trackers, and whoever wants to.

The loop tells each row to all of them and knows none by name. Needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from sparsae.runs.rows import Row


@dataclass(frozen=True)
class Standing:
    """Where training begins or goes on: steps done and planned, topology updates made and accepted."""

    step: int
    steps: int
    updates: int = 0
    accepted: int = 0


class Observer(ABC):
    """Sees every row of a run in its order."""

    @abstractmethod
    def observe(self, row: Row) -> None:
        """A row that was just measured."""

    def begin(self, standing: Standing) -> None:  # noqa: B027 - who has nothing to do writes nothing
        """Training begins, or goes on."""

    def end(self) -> None:  # noqa: B027
        """Training ended: at its last step, by a stop or by an error."""
