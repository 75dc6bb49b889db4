"""The runs of a transfer experiment: one a point, and what each takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from sparsae.config import DataConfig
from sparsae.experiments.forecast import Planned, merged
from sparsae.experiments.jobs import Job, job_of
from sparsae.experiments.matching import Cost
from sparsae.experiments.transfer.plan import Point, TransferPlan
from sparsae.train.model import require_fit


class Sweep:
    """The runs of a plan. Raises InputError for whatever is wrong with it, before any text is read."""

    def __init__(self, plan: TransferPlan, vocabulary: Callable[[DataConfig], int]) -> None:
        self._vocabulary = vocabulary
        self.configs = {point: plan.config(point) for point in plan.points()}
        plan.require_effect()
        self._cells = {(point.width, point.sparsity): config for point, config in self.configs.items()}
        for config in self._cells.values():
            require_fit(config)

    @cached_property
    def jobs(self) -> dict[Point, Job]:
        """The run of every point of the sweep."""
        return {
            point: job_of(point.name, config, self._costs[point.width, point.sparsity].flops(config.training.steps))
            for point, config in self.configs.items()
        }

    def planned(self) -> list[Planned]:
        """The runs of each width and sparsity."""
        costs = self._costs
        return merged(
            Planned.of(f"width {point.width}", point.sparsity, job, costs[point.width, point.sparsity])
            for point, job in self.jobs.items()
        )

    @cached_property
    def _costs(self) -> dict[tuple[int, float], Cost]:
        vocabulary = self._vocabulary(next(iter(self.configs.values())).data)
        return {cell: Cost(config, vocabulary) for cell, config in self._cells.items()}
