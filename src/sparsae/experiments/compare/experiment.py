"""An experiment from its plan to its results: budgets, learning rates, runs, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from sparsae.config import DataConfig
from sparsae.data import prepare
from sparsae.errors import InputError
from sparsae.experiments.board import Board
from sparsae.experiments.compare.plan import LEARNING_RATE, ComparisonPlan, cells, require_effect
from sparsae.experiments.compare.record import Results
from sparsae.experiments.compare.results import Cell, Search, Trial, collect, write_results
from sparsae.experiments.compare.tasks import fine_tune
from sparsae.experiments.compare.tuning import Found, Key, Point, key_of, search
from sparsae.experiments.directory import claimed, require_place
from sparsae.experiments.execution import Executor, execute
from sparsae.experiments.forecast import Planned, merged
from sparsae.experiments.jobs import Failure, Job, forget_checkpoints, job_of, outcome
from sparsae.experiments.matching import Budget, Cost, with_steps
from sparsae.experiments.page import write_page
from sparsae.tasks.study import read_tasks
from sparsae.train.model import require_fit
from sparsae.train.progress import Display

# Settings, by how their names begin, that change no operation.
_COSTLESS = ("training.learning_rate", "training.sparse_learning_rate", "parameterization.")


@dataclass
class RunLengths:
    """How long each run of a plan is: made of the settings and the vocabulary alone, so the same at every start."""

    plan: ComparisonPlan
    vocabulary: Callable[[DataConfig], int]
    _costs: dict[tuple[str, float, Key], Cost] = field(default_factory=dict)

    def cost(self, variant: str, sparsity: float, point: Point | None = None) -> Cost:
        """What a variant's runs take; the same for all seeds, learning rates and initial scales."""
        costly = {setting: value for setting, value in (point or {}).items() if not setting.startswith(_COSTLESS)}
        config = self.plan.config(variant, sparsity, self.plan.seeds[0], costly)
        if (variant, sparsity, key_of(costly)) not in self._costs:
            require_fit(config)
            self._costs[variant, sparsity, key_of(costly)] = Cost(config, self.vocabulary(config.data))
        return self._costs[variant, sparsity, key_of(costly)]

    def budget(self, variant: str, sparsity: float) -> Budget:
        """What a compared run of a variant may take at a sparsity."""
        match, plan = self.plan.match_of(variant), self.plan
        if plan.budget is not None and match == plan.match:
            return Budget(match, plan.budget)
        reference = self.cost(plan.held_against, sparsity)
        steps = reference.config.training.steps
        if plan.budget is not None:
            steps = reference.steps(Budget(plan.match, plan.budget), plan.held_against, self._advice())
        return Budget(match, reference.of(match, steps))

    def job(self, variant: str, sparsity: float, seed: int, folder: str, point: Point, share: float = 1.0) -> Job:
        """A run of the length that its budget, or a share of it, allows, at a point of its tuning."""
        cost = self.cost(variant, sparsity, point)
        budget, name = self.budget(variant, sparsity).part(share), f"{variant} at sparsity {sparsity:g}"
        steps = cost.steps(budget, name, self._advice(is_trial=folder == "tuning"))
        config = with_steps(self.plan.config(variant, sparsity, seed, point), steps)
        name = f"{folder}/{variant}-{sparsity:g}-{seed}"
        if folder == "tuning":
            names = {LEARNING_RATE: "lr"}
            name += "".join(f"-{names.get(setting, setting)}{value:.9g}" for setting, value in point.items())
        return job_of(name, config, cost.flops(steps))

    def planned(self) -> list[Planned]:
        """The runs, the trials of the grids first, all as if the plan's own settings were the tuned ones."""
        plan, found, jobs = self.plan, list[Planned](), Jobs()
        require_effect(plan)
        for sparsity in plan.sparsities:
            for variant in plan.named_variants:
                for axis in plan.axes(variant, sparsity):
                    for point in ({axis.setting: value} for value in axis.values):
                        job = self.trial(variant, sparsity, point)
                        if jobs.add(job) is job:
                            cost = self.cost(variant, sparsity, point)
                            found.append(Planned.of(f"{variant}: trial", sparsity, job, cost))
        for seed, sparsity, variant in cells(plan):
            job = self.job(variant, sparsity, seed, "runs", {})
            if jobs.add(job) is job:
                found.append(Planned.of(variant, sparsity, job, self.cost(variant, sparsity)))
        return merged(found)

    def trial(self, variant: str, sparsity: float, point: Point) -> Job:
        """A run that tries a point, of the length of all trials."""
        return self.job(variant, sparsity, self.plan.tuning.seed, "tuning", point, self.trial_share)

    def _advice(self, *, is_trial: bool = False) -> str:
        """Where the length of a run, or of a trial, was given."""
        place, tuning = self.plan.place, self.plan.tuning
        whole = place("settings", "training", "steps") if self.plan.budget is None else place("budget")
        if not is_trial:
            return whole
        if tuning.budget is not None:
            return f"{place('tuning', 'budget')} (trials have {self.trial_share:.3g} of a run) or {whole}"
        return f"{place('tuning', 'share')} or {whole}" if tuning.share < 1.0 else whole

    @cached_property
    def trial_share(self) -> float:
        """How long each trial is in terms of a compared run: one share for all, the longest that the budget carries."""
        tuning = self.plan.tuning
        if tuning.budget is None:
            return tuning.share
        runs = trials = 0.0
        for sparsity in self.plan.sparsities:
            for variant in self.plan.all_variants:
                flops = self.job(variant, sparsity, tuning.seed, "runs", {}).flops
                runs += len(self.plan.seeds) * flops
                if variant in self.plan.named_variants:
                    values = sum(len(axis.values) for axis in self.plan.axes(variant, sparsity))
                    trials += tuning.rounds * values * flops
        return min(tuning.share, tuning.budget * runs / trials) if trials else tuning.share


class Jobs:
    """The jobs of an experiment; equal settings are one run, whatever it is called."""

    def __init__(self) -> None:
        self._by_config: dict[str, Job] = {}

    def add(self, job: Job) -> Job:
        """The job that has these settings."""
        return self._by_config.setdefault(job.config.model_dump_json(), job)

    def all(self) -> list[Job]:
        """In the order in which they were added."""
        return list(self._by_config.values())


class Comparison:
    """A plan in a directory. Raises InputError, before anything is written, for whatever is wrong with either.

    admit: raises InputError for a run that cannot be executed as it shall be.
    """

    def __init__(
        self, plan: ComparisonPlan, out: Path, quiet: bool = False, admit: Callable[[Job], None] | None = None
    ) -> None:
        require_place(out, plan)
        admit = admit or (lambda _: None)
        self.plan, self.out, self.board = plan, out, Board(quiet)
        self._display = Display(quiet)
        self._vocabularies: dict[str, int] = {}  # by the settings of the text, as JSON
        self.lengths = RunLengths(plan, self._vocabulary)
        self._jobs = Jobs()
        self._tasks = read_tasks(plan.tasks) if plan.tasks else []
        self._trials: dict[tuple[str, float, Key], Trial] = {}
        require_effect(plan)
        for seed, sparsity, variant in cells(plan):
            # Wrong settings of any run are refused now, not hours later.
            admit(self.lengths.job(variant, sparsity, seed, "runs", {}))
        for tuned in self._tuned():
            for axis in plan.axes(*tuned):
                for value in axis.values:
                    admit(self.lengths.trial(*tuned, {axis.setting: value}))

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
                    fine_tune(self.out / job.name, job.config, self.plan.tasks, self._tasks, display.stage)

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
