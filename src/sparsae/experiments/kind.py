"""What a kind of experiment is: a plan, what carries it out, and how its results are told.

Needs no torch: what measures and draws is imported when it is wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from sparsae.experiments.plan import BasePlan

if TYPE_CHECKING:
    from sparsae.config import DataConfig
    from sparsae.experiments.execution import Executor
    from sparsae.experiments.forecast import Planned
    from sparsae.experiments.jobs import Job
    from sparsae.report.tables import Table


class Results(Protocol):
    """A record of what an experiment found."""

    @property
    def kind(self) -> str:
        """What its plan calls it."""

    @property
    def rows(self) -> Sequence[object]:
        """What was measured."""

    @property
    def warnings(self) -> Sequence[str]:
        """What a reader must know before believing a number."""


class Experiment(Protocol):
    """A plan in a directory."""

    def run(self, executor: Callable[[int], Executor]) -> Results | None:
        """Execute what is not yet done; the results, or None where a signal stopped it after saving.

        executor: what makes the executor from the descriptor that locks the directory; for a kind whose measurements
        are runs.
        """


class Kind(ABC):
    """One or more kinds of experiments, by the names that `kind` has in their plans."""

    plan: type[BasePlan]

    @property
    def names(self) -> tuple[str, ...]:
        """What `kind` may be in a plan."""
        return get_args(self.plan.model_fields["kind"].annotation)

    @abstractmethod
    def experiment(self, plan: Any, out: Path, quiet: bool, admit: Sequence[Callable[[Job], None]] = ()) -> Experiment:
        """A plan of this kind in a directory.

        admit: each raises InputError for a run that cannot be executed as it shall. Raises InputError, before anything
        is written, for whatever is wrong with plan, directory or runs.
        """

    def planned(self, plan: Any, vocabulary: Callable[[DataConfig], int]) -> Sequence[Planned]:
        """The runs of a plan, as far as they are known before the first one; none of a kind that measures otherwise.

        vocabulary: the entries of a text's tokenizer. Raises InputError for whatever is wrong with the plan.
        """
        return ()

    @abstractmethod
    def read(self, content: dict[str, Any], origin: str) -> Results:
        """The results in the content of a results.json, whose record `study` gave; may change its argument.

        What an earlier version wrote is put in the form of this one. Raises InputError, which names the origin, for
        anything else.
        """

    @abstractmethod
    def title(self, results: Any) -> str:
        """The heading of the page."""

    @abstractmethod
    def body(self, results: Any, out: Path) -> str:
        """The page, but for its frame; out: where the runs lie that it may show."""

    @abstractmethod
    def tables(self, results: Any) -> Sequence[Table]:
        """What a terminal shows, in the order in which it is told."""

    def conclusions(self, results: Any) -> Sequence[str]:
        """Lines beneath the tables."""
        return ()
