"""How long each run of a comparison is, so that all take what its plan gives them, and which runs there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from sparsae.config import DataConfig
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import LEARNING_RATE, ComparisonPlan, cells, require_effect, require_one_text
from sparsae.experiments.compare.tuning import Key, Point, key_of
from sparsae.experiments.forecast import Planned, merged
from sparsae.experiments.jobs import Job, job_of
from sparsae.experiments.matching import Budget, Cost, with_steps
from sparsae.runs.directory import RunDirectory
from sparsae.train.model import require_fit

# Settings, by how their names begin, that change no operation.
_COSTLESS = ("training.learning_rate", "training.sparse_learning_rate", "parameterization.")
TRIALS = "tuning"  # the folder of trials, below the experiment's
_LONGEST_POINT = 160  # characters; a file system has 255 for the name of a trial's directory


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
        steps = cost.steps(budget, name, self._advice(is_trial=folder == TRIALS))
        config = with_steps(self.plan.config(variant, sparsity, seed, point), steps)
        name = f"{folder}/{variant}-{sparsity:g}-{seed}"
        if folder == TRIALS:
            names = {LEARNING_RATE: "lr"}
            where = "".join(f"-{names.get(setting, setting)}{value:.9g}" for setting, value in point.items())
            name += where if len(where) <= _LONGEST_POINT else f"-{blake2b(where.encode(), digest_size=16).hexdigest()}"
        return job_of(name, config, cost.flops(steps))

    def planned(self) -> list[Planned]:
        """The runs, the trials of the grids first, all as if the plan's own settings were the tuned ones."""
        plan, found, jobs = self.plan, list[Planned](), Jobs()
        require_effect(plan)
        require_one_text(plan)
        for sparsity in plan.sparsities:
            for variant in plan.named_variants:
                for point in self.grid(variant, sparsity):
                    job = self.trial(variant, sparsity, point)
                    if jobs.add(job) is job:
                        cost = self.cost(variant, sparsity, point)
                        found.append(Planned.of(f"{variant}: trial", sparsity, job, cost))
        for seed, sparsity, variant in cells(plan):
            job = self.job(variant, sparsity, seed, "runs", {})
            if jobs.add(job) is job:
                found.append(Planned.of(variant, sparsity, job, self.cost(variant, sparsity)))
        return merged(found)

    def grid(self, variant: str, sparsity: float) -> list[Point]:
        """The points of a variant's grids, each axis with the first values of those before, for their unknown best.

        So a value that is the setting's own anyway makes a point of equal settings, as it does when tuning comes to it.
        """
        points, around = list[Point](), dict[str, float]()
        for axis in self.plan.axes(variant, sparsity):
            points += [{**around, axis.setting: value} for value in axis.values]
            around[axis.setting] = axis.values[0]
        return points

    def trial(self, variant: str, sparsity: float, point: Point) -> Job:
        """A run that tries a point, of the length of all trials."""
        return self.job(variant, sparsity, self.plan.tuning.seed, TRIALS, point, self.trial_share)

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
        runs = trials = 0
        compared, tried = Jobs(), Jobs()
        for sparsity in self.plan.sparsities:
            for variant in self.plan.all_variants:
                job = self.job(variant, sparsity, tuning.seed, "runs", {})
                runs += len(self.plan.seeds) * job.flops if compared.add(job) is job else 0
                for point in self.grid(variant, sparsity) if variant in self.plan.named_variants else ():
                    job = self.job(variant, sparsity, tuning.seed, "runs", point)
                    trials += tuning.rounds * job.flops if tried.add(job) is job else 0
        return min(tuning.share, tuning.budget * runs / trials) if trials else tuning.share


class Jobs:
    """The jobs of an experiment; equal settings are one run, whatever it is called.

    out: of an experiment that may have been started before. Which of several points that share a trial was looked at
    first depends on how far tuning had come: a trial that exists keeps its name.
    """

    def __init__(self, out: Path | None = None) -> None:
        self._out, self._by_config = out, dict[str, Job]()

    def add(self, job: Job) -> Job:
        """The job that has these settings."""
        settings = job.config.model_dump_json()
        if settings not in self._by_config:
            name = self._made.get(settings) if job.name.startswith(f"{TRIALS}/") else None
            self._by_config[settings] = job if name is None else replace(job, name=name)
        return self._by_config[settings]

    @cached_property
    def _made(self) -> dict[str, str]:
        """The trials that an earlier start has begun, by their settings."""
        found = {}
        for path in sorted((self._out / TRIALS).glob("*")) if self._out else ():
            with suppress(InputError):  # a directory that is damaged is told once it is wanted
                if (run := RunDirectory(path)).begun():
                    found[run.config().model_dump_json()] = f"{TRIALS}/{path.name}"
        return found
