"""A comparison from its plan to its results: learning rates, runs, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import product
from pathlib import Path

from sparsae.config import DataConfig
from sparsae.data import prepare
from sparsae.errors import InputError
from sparsae.experiments.board import Board
from sparsae.experiments.compare.lengths import Jobs, RunLengths
from sparsae.experiments.compare.plan import ComparisonPlan, cells, require_effect, require_one_text
from sparsae.experiments.compare.record import Results
from sparsae.experiments.compare.results import Cell, Search, Trial, collect, write_results
from sparsae.experiments.compare.tasks import fine_tune
from sparsae.experiments.compare.tuning import Found, Key, Point, key_of, search
from sparsae.experiments.directory import claimed, require_place
from sparsae.experiments.execution import Executor, execute
from sparsae.experiments.jobs import Failure, Job, forget_checkpoints, outcome
from sparsae.experiments.page import write_page
from sparsae.tasks.finetune import DivergedError
from sparsae.tasks.study import read_tasks, require_length
from sparsae.train.progress import Display


class Comparison:
    """A plan in a directory. Raises InputError, before anything is written, for whatever is wrong with either.

    admit: each raises InputError for a run that cannot be executed as it shall be.
    """

    def __init__(
        self, plan: ComparisonPlan, out: Path, quiet: bool = False, admit: Sequence[Callable[[Job], None]] = ()
    ) -> None:
        require_place(out, plan)
        self.plan, self.out, self.board = plan, out, Board(quiet)
        self._display = Display(quiet)
        self._vocabularies: dict[str, int] = {}  # by the settings of the text, as JSON
        self.lengths = RunLengths(plan, self._vocabulary)
        self._jobs = Jobs(out)
        self._tasks = read_tasks(plan.tasks) if plan.tasks else []
        self._trials: dict[tuple[str, float, Key], Trial] = {}
        require_effect(plan)
        require_one_text(plan)
        # Wrong settings of any run are refused now, not hours later.
        jobs = [self.lengths.job(variant, sparsity, seed, "runs", {}) for seed, sparsity, variant in cells(plan)]
        for tuned in self._tuned():
            jobs += [self.lengths.trial(*tuned, point) for point in self.lengths.grid(*tuned)]
        for job, check in product(jobs, admit):
            check(job)
        if plan.tasks is not None:
            require_length(plan.tasks, min(job.config.model.context for job in jobs))

    def run(self, executor: Callable[[int], Executor]) -> Results | None:
        """Execute what is not yet done; the results, or None where a signal stopped it after saving.

        executor: what makes the executor from the descriptor that locks the directory.
        """
        with claimed(self.out, self.plan) as lock:
            with closing(executor(lock)) as runs:
                # A trial has said what it had to: its learning rate. Its weights would fill the disk.
                forget = partial(forget_checkpoints, self.out)
                while wanted := self.wanted():
                    if not execute([self._trial(*trial).job for trial in wanted], self.out, self.board, forget, runs):
                        return None
                compared = [cell.job for cell in self.cells]
                if not execute(compared, self.out, self.board, lambda _: self._write_rows(), runs):
                    return None
            self._fine_tune(compared)
            return self._write()

    def _fine_tune(self, compared: Sequence[Job]) -> None:
        """Of runs that ended with a model; one that was stopped here goes on after the last fine-tuning that ended."""
        if self.plan.tasks is None:
            return
        with closing(self._display) as display:
            for job in {job.name: job for job in compared}.values():
                if not isinstance(outcome(self.out / job.name), Failure):
                    display.say(f"{job.name}: tasks")
                    try:
                        fine_tune(self.out / job.name, job.config, self.plan.tasks, self._tasks, display.stage)
                    except DivergedError as error:  # the run has no scores, and the others theirs
                        display.say(f"{job.name}: {error}")

    def found(self, variant: str, sparsity: float) -> Found:
        """What the tuning of a variant at a sparsity has found by now."""

        def loss(point: Point) -> float | None:
            trial = self._trial(variant, sparsity, point)
            return None if outcome(self.out / trial.job.name) is None else trial.loss(self.out)

        def allowed(point: Point) -> bool:
            try:
                self._trial(variant, sparsity, point)
            except InputError:
                return False
            return True

        tuning = self.plan.tuning
        return search(self.plan.axes(variant, sparsity), tuning.rounds, tuning.extensions, loss, allowed)

    def wanted(self) -> list[tuple[str, float, Point]]:
        """(variant, sparsity, point) of the trials without which tuning cannot continue; none when it is done."""
        return [(*tuned, point) for tuned in self._tuned() for point in self.found(*tuned).wanted]

    @cached_property
    def searches(self) -> list[Search]:
        """What tuning found, once it is done, for each variant at each sparsity."""
        return [
            Search(*tuned, found, [self._trial(*tuned, point) for point in found.tried()])
            for tuned in self._tuned()
            if (found := self.found(*tuned)).looks
        ]

    @cached_property
    def cells(self) -> list[Cell]:
        """The compared runs; their tuned settings are known once the trials are done."""
        return [
            Cell(
                variant,
                sparsity,
                seed,
                self.lengths.budget(variant, sparsity),
                point := self.point(variant, sparsity),
                self._jobs.add(self.lengths.job(variant, sparsity, seed, "runs", point)),
            )
            for seed, sparsity, variant in cells(self.plan)
        ]

    def point(self, variant: str, sparsity: float) -> Point:
        """The tuned settings; empty where nothing is tuned."""
        tuned = self.plan.tuned_as(variant), sparsity
        return next((s.found.point for s in self.searches if (s.variant, s.sparsity) == tuned), {})

    def _tuned(self) -> list[tuple[str, float]]:
        return [(variant, sparsity) for sparsity in self.plan.sparsities for variant in self.plan.named_variants]

    def _trial(self, variant: str, sparsity: float, point: Point) -> Trial:
        key = variant, sparsity, key_of(point)
        if key not in self._trials:
            self._trials[key] = Trial(point, self._jobs.add(self.lengths.trial(variant, sparsity, point)))
        return self._trials[key]

    def _write_rows(self) -> None:
        """What is known so far, for whoever cannot wait."""
        write_results(self._results(), self.out)

    def _write(self) -> Results:
        results = self._results()
        write_results(results, self.out)
        write_page(self.out)
        return results

    def _results(self) -> Results:
        finished = [cell for cell in self.cells if outcome(self.out / cell.job.name) is not None]
        complete = len(finished) == len(self.cells)
        return collect(self.plan, self.out, finished, self.searches, self.lengths.trial_share, complete)

    def _vocabulary(self, data: DataConfig) -> int:
        key = data.model_dump_json()
        if key not in self._vocabularies:
            self._vocabularies[key] = prepare(data, self._display.stage).vocab_size
            self._display.close()
        return self._vocabularies[key]
