"""An experiment from its plan to its results: budgets, learning rates, runs, and what they say together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sparsae.config import DataConfig
from sparsae.data import prepare
from sparsae.experiments.board import Board
from sparsae.experiments.directory import check_place, claimed
from sparsae.experiments.execution import Executor, execute
from sparsae.experiments.matching import Budget, Cost, with_steps
from sparsae.experiments.page import write_page
from sparsae.experiments.plan import Plan, cells
from sparsae.experiments.results import Cell, Trial, collect, write_results
from sparsae.experiments.units import Unit, forget_checkpoints, outcome, unit_of
from sparsae.train.build import check
from sparsae.train.progress import Display


@dataclass
class Schedule:
    """How long each run of a plan is: made of the settings and the vocabulary alone, so the same at every start."""

    plan: Plan
    vocabulary: Callable[[DataConfig], int]
    _costs: dict[tuple[str, float], Cost] = field(default_factory=dict)

    def cost(self, variant: str, sparsity: float) -> Cost:
        """What a variant's runs take; the same for all seeds and learning rates."""
        if (variant, sparsity) not in self._costs:
            config = self.plan.config(variant, sparsity, self.plan.seeds[0])
            check(config)
            self._costs[variant, sparsity] = Cost(config, self.vocabulary(config.data))
        return self._costs[variant, sparsity]

    def budget(self, variant: str, sparsity: float) -> Budget:
        """What a compared run of a variant may take at a sparsity."""
        match, plan = self.plan.match_of(variant), self.plan
        if plan.budget is not None and match == plan.match:
            return Budget(match, plan.budget)
        reference = self.cost(plan.held_against, sparsity)
        steps = reference.config.training.steps
        if plan.budget is not None:
            steps = reference.steps(Budget(plan.match, plan.budget), plan.held_against)
        return Budget(match, reference.of(match, steps))

    def unit(
        self, variant: str, sparsity: float, seed: int, folder: str, learning_rate: float | None, share: float = 1.0
    ) -> Unit:
        """A run of the length that its budget, or a share of it, allows."""
        cost = self.cost(variant, sparsity)
        steps = cost.steps(self.budget(variant, sparsity).part(share), f"{variant} at sparsity {sparsity:g}")
        config = with_steps(self.plan.config(variant, sparsity, seed, learning_rate), steps)
        name = f"{folder}/{variant}-{sparsity:g}-{seed}"
        if folder == "tuning":
            name += f"-lr{learning_rate:g}"
        return unit_of(name, config, cost.flops(steps))


class Units:
    """The units of an experiment; equal settings are one run, whatever it is called."""

    def __init__(self) -> None:
        self._by_config: dict[str, Unit] = {}

    def add(self, unit: Unit) -> Unit:
        """The unit that has these settings."""
        return self._by_config.setdefault(unit.config.model_dump_json(), unit)

    def all(self) -> list[Unit]:
        """In the order in which they were added."""
        return list(self._by_config.values())


class Experiment:
    """A plan in a directory. Raises InputError, before anything is written, for whatever is wrong with either."""

    def __init__(self, plan: Plan, out: Path, quiet: bool = False) -> None:
        check_place(out, plan)
        self.plan, self.out, self.board = plan, out, Board(quiet)
        self._display = Display(quiet)
        self._vocabularies: dict[DataConfig, int] = {}
        self.schedule = Schedule(plan, self._vocabulary)
        self._units = Units()
        for seed, sparsity, variant in cells(plan):
            # Wrong settings of any run are refused now, not hours later.
            self.schedule.unit(variant, sparsity, seed, "runs", None)

    def run(self, executor: Callable[[int], Executor]) -> dict[str, Any] | None:
        """Execute what is not yet done; the results, or None where a signal stopped it after saving.

        executor: what makes the executor from the descriptor that locks the directory.
        """
        with claimed(self.out, self.plan) as lock:
            with closing(executor(lock)) as runs:
                # A trial has said what it had to: its learning rate. Its weights would fill the disk.
                forget = partial(forget_checkpoints, self.out)
                if not execute([trial.unit for trial in self.trials], self.out, self.board, forget, runs):
                    return None
                compared = [cell.unit for cell in self.cells]
                if not execute(compared, self.out, self.board, lambda _: self._write_rows(), runs):
                    return None
            return self._write()

    @cached_property
    def trials(self) -> list[Trial]:
        """The tuning runs: the same learning rates for every variant at every sparsity."""
        tuning, plan = self.plan.tuning, self.plan
        return [
            Trial(
                variant,
                sparsity,
                rate,
                self._units.add(self.schedule.unit(variant, sparsity, tuning.seed, "tuning", rate, tuning.share)),
            )
            for sparsity in plan.sparsities
            for variant in plan.all_variants
            for rate in tuning.learning_rates
        ]

    @cached_property
    def cells(self) -> list[Cell]:
        """The compared runs; their learning rates are known once the trials are done."""
        return [
            Cell(
                variant,
                sparsity,
                seed,
                self.schedule.budget(variant, sparsity),
                self._units.add(self.schedule.unit(variant, sparsity, seed, "runs", self.rate(variant, sparsity))),
            )
            for seed, sparsity, variant in cells(self.plan)
        ]

    def rate(self, variant: str, sparsity: float) -> float | None:
        """The tuned learning rate; None where nothing is tuned. The lower one of two that are equally good."""
        mine = [trial for trial in self.trials if (trial.variant, trial.sparsity) == (variant, sparsity)]
        best = min(mine, key=lambda trial: (trial.loss(self.out), trial.learning_rate), default=None)
        return best.learning_rate if best else None

    def _write_rows(self) -> None:
        """What is known so far, for whoever cannot wait."""
        write_results(self._results(), self.out)

    def _write(self) -> dict[str, Any]:
        results = self._results()
        write_results(results, self.out)
        write_page(self.out)
        return results

    def _results(self) -> dict[str, Any]:
        finished = [cell for cell in self.cells if outcome(self.out / cell.unit.name) is not None]
        return collect(self.plan, self.out, finished, self.trials, complete=len(finished) == len(self.cells))

    def _vocabulary(self, data: DataConfig) -> int:
        if data not in self._vocabularies:
            self._vocabularies[data] = prepare(data, self._display.stage).vocab_size
            self._display.close()
        return self._vocabularies[data]
