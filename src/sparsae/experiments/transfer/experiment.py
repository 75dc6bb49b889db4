"""A transfer experiment from its plan to its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path

from sparsae.config import DataConfig
from sparsae.data import prepare
from sparsae.experiments.board import Board
from sparsae.experiments.directory import claimed, require_place
from sparsae.experiments.execution import Executor, execute
from sparsae.experiments.jobs import Job, forget_checkpoints, outcome
from sparsae.experiments.page import write_page
from sparsae.experiments.transfer.plan import TransferPlan
from sparsae.experiments.transfer.record import Results
from sparsae.experiments.transfer.results import collect, write_results
from sparsae.experiments.transfer.sweep import Sweep
from sparsae.train.progress import Display


class Transfer:
    """A plan in a directory. Raises InputError, before anything is written, for whatever is wrong with either.

    admit: each raises InputError for a run that cannot be executed as it shall be.
    """

    def __init__(
        self, plan: TransferPlan, out: Path, quiet: bool = False, admit: Sequence[Callable[[Job], None]] = ()
    ) -> None:
        require_place(out, plan)
        self.plan, self.out, self.board = plan, out, Board(quiet)
        self._display = Display(quiet)
        self._sweep = Sweep(plan, self._vocabulary)
        for job, check in product(self._sweep.jobs.values() if admit else (), admit):
            check(job)

    def run(self, executor: Callable[[int], Executor]) -> Results | None:
        """Execute what is not yet done; the results, or None where a signal stopped it after saving.

        executor: what makes the executor from the descriptor that locks the directory.
        """
        jobs = self._sweep.jobs
        with claimed(self.out, self.plan) as lock, closing(executor(lock)) as runs:
            if not execute(list(jobs.values()), self.out, self.board, self._ended, runs):
                return None
            results = self._results()
            write_results(results, self.out)
            write_page(self.out)
            return results

    def _vocabulary(self, data: DataConfig) -> int:
        size = prepare(data, self._display.stage).vocab_size
        self._display.close()
        return size

    def _ended(self, job: Job) -> None:
        """Of hundreds of runs only the losses are wanted; what is known so far is there for whoever cannot wait."""
        forget_checkpoints(self.out, job)
        write_results(self._results(), self.out)

    def _results(self) -> Results:
        jobs, configs = self._sweep.jobs, self._sweep.configs
        done = {point: found for point, job in jobs.items() if (found := outcome(self.out / job.name))}
        return collect(self.plan, done, {point: configs[point] for point in done})
