"""How jobs are executed: each way is an `Executor`, of which the simplest is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsae.errors import InputError
from sparsae.experiments.board import Board
from sparsae.experiments.jobs import Job, mark_stacked, outcome, require_same_settings, run_job
from sparsae.train.stopping import StopRequest

Told = Callable[[Job], None]


class Executor(ABC):
    """A way to run jobs."""

    together = False
    """Whether jobs share their passes, so that their times are not their own."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], out: Path, begun: Told, ended: Told) -> bool:
        """Run jobs below a directory, calling `begun` and `ended` for each; False where it was asked to stop.

        Raises InputError, naming the job, where one cannot be run.
        """

    def close(self) -> None:  # noqa: B027 - not every way keeps something open
        """Give back what is kept open between calls of `run`."""


def execute(jobs: Sequence[Job], out: Path, board: Board, ended: Told, executor: Executor) -> bool:
    """Bring all jobs to their ends, each once, as `Executor.run`; those that are done are left as they are.

    Raises InputError also where the directory of one holds a run of other settings.
    """
    jobs = list({job.name: job for job in jobs}.values())
    for job in jobs:
        require_same_settings(out / job.name, job.config)
    todo = [job for job in jobs if outcome(out / job.name) is None]

    def begin(job: Job) -> None:
        if executor.together:
            mark_stacked(out, job)
        board.begin(job)

    def end(job: Job) -> None:
        board.end(job)
        ended(job)

    with board.watching(jobs, out):
        return executor.run(todo, out, begin, end) if todo else True


class InOrder(Executor):
    """One after the other, in this process."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def run(self, jobs: Sequence[Job], out: Path, begun: Told, ended: Told) -> bool:
        """See `Executor`."""
        for job in jobs:
            if self._stop.asked:
                return False
            begun(job)
            try:
                finished = run_job(out / job.name, job.config, self._stop)
            except InputError as error:
                raise InputError(f"{job.name}: {error}") from None
            if not finished:
                return False
            ended(job)
        return True
