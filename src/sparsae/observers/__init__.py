"""Who looks at a run while it trains: the metrics file, the display, trackers, and whoever wants to.

The loop tells each row to all of them and knows none by name. Those that settings name (`tracking`) are each a file
here, or somebody else's file or package. Needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparsae.errors import InputError
from sparsae.registry import Names
from sparsae.runs.rows import Row


@dataclass(frozen=True)
class Standing:
    """Where training begins or continues: steps done and planned, topology updates made and accepted."""

    step: int
    steps: int
    updates: int = 0
    accepted: int = 0


class Observer(ABC):
    """Sees every row of a run in its order."""

    @classmethod  # noqa: B027
    def require(cls) -> None:
        """Raises InputError, before anything of a run is read, where a package that is wanted is missing."""

    @abstractmethod
    def observe(self, row: Row) -> None:
        """A row that was just measured."""

    def begin(self, standing: Standing) -> None:  # noqa: B027
        """Training begins, or continues."""

    def end(self) -> None:  # noqa: B027
        """Training ended: at its last step, by a stop or by an error."""


MakesObserver = Callable[[Path], Observer]
Made = TypeVar("Made", bound=MakesObserver)


class _Observers(Names[MakesObserver]):
    def register(self, name: str) -> Callable[[Made], Made]:
        """A decorator for a class, or a function, that makes an observer from the run's directory.

        Raises InputError for a name that another one has.
        """
        self._require_free(name)

        def registered(make: Made) -> Made:
            known = self._known(name)
            if known is not None and _place(known) != _place(make):  # a module may be loaded anew
                raise InputError(f"observer '{name}' is registered already, by {_place(known)}: take another name")
            self._entries[name] = make
            return make

        return registered


def _place(make: object) -> str:
    return f"{getattr(make, '__module__', '')}.{getattr(make, '__qualname__', make)}"


OBSERVERS = _Observers("observer", "sparsae.observers")
