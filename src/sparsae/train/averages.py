"""Means over the steps since the last train row, and how fast they were."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from sparsae.runs.rows import TrainRow
from sparsae.train.account import Account

_NAMES = ("loss", "cross_entropy", "distillation", "steps", "taught_steps")


class Averages:
    """Sums over steps, which a checkpoint carries, and a clock of this process."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(_NAMES, 0)
        self._clock = (time.perf_counter(), 0, 0)

    def add(self, loss: float, cross_entropy: float, distillation: float, passes: int) -> None:
        """One of the forward `passes` of a step; the distillation times the share of its sequences that were taught."""
        self._sums["loss"] += loss / passes
        self._sums["cross_entropy"] += cross_entropy / passes
        self._sums["distillation"] += distillation / passes

    def end_step(self, taught: float) -> None:
        """All passes of a step were added, of whose tokens this share was taught."""
        self._sums["steps"] += 1
        self._sums["taught_steps"] += taught

    def start_clock(self, step: int, account: Account) -> None:
        """What came before the end of this step is no part of the pace."""
        self._clock = (time.perf_counter(), step, account.flops.total)

    def row(self, step: int, account: Account, learning_rate: float, gradient_norm: float, burn_in: bool) -> TrainRow:
        """At the end of a step, of which the last three are told; sums and clock begin anew.

        The losses are NaN where all steps were skipped.
        """
        sums, (started, first, counted) = self._sums, self._clock
        steps, taught = sums["steps"], sums["taught_steps"]
        self._sums = dict.fromkeys(_NAMES, 0)
        self.start_clock(step, account)
        seconds = self._clock[0] - started
        flops_per_second = (account.flops.total - counted) / seconds
        return TrainRow(
            step=step,
            tokens=account.tokens(step),
            loss=sums["loss"] / steps if steps else math.nan,
            cross_entropy=sums["cross_entropy"] / steps if steps else math.nan,
            distillation=sums["distillation"] / taught if taught else None,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            nnz=account.costs.nnz,
            density=account.costs.density,
            burn_in=burn_in,
            train_flops=account.flops.total,
            seconds=account.watch.total,
            tokens_per_second=account.tokens(step - first) / seconds,
            flops_per_second=flops_per_second,
            mfu=account.utilization(flops_per_second),
        )

    def state_dict(self) -> dict[str, float]:
        """For checkpoints."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """From `state_dict`."""
        self._sums = dict(state)
