"""How a quantity moves over a run: pure functions of the step or of the share of the run that has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def cosine_with_warmup(step: int, steps: int, warmup: float, final: float) -> float:
    """Multiplier of the peak at `step` of `steps`, counted from 0.

    With w = warmup * steps: (step + 1) / w while step < w, then final + (1 - final) (1 + cos(pi t)) / 2 with t going
    from 0 to 1 over the remaining steps. Never 0 at the first step.
    """
    warm_steps = round(warmup * steps)
    if step < warm_steps:
        return (step + 1) / warm_steps
    progress = (step - warm_steps) / max(1, steps - 1 - warm_steps)
    return final + (1.0 - final) * decayed("cosine", min(1.0, progress))


def decayed(kind: Literal["constant", "linear", "cosine"], progress: float) -> float:
    """1 at progress 0 and, but for "constant", 0 at progress 1: 1 - p, or (1 + cos(pi p)) / 2."""
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return (1.0 + math.cos(math.pi * progress)) / 2.0
    raise ValueError(f"unknown schedule '{kind}': use constant, linear or cosine")


def is_periodic(step: int, steps: int, every: int, stop: float) -> bool:
    """Whether `every` divides `step`, counted from 1, of `steps`, before the share `stop` of them has passed."""
    return step % every == 0 and step < min(stop * steps, steps)


@dataclass(frozen=True)
class Cubic:
    """A quantity that falls from where it is to where it shall be (Zhu & Gupta, 2017):

        x_t = x_end + (x_start - x_end) (1 - (t - t_0) / (t_1 - t_0))^3          for t_0 <= t <= t_1,

    t_0 and t_1 being `start` and `stop` as shares of the steps. It moves every `every` steps from t_0 on, and at t_1.
    """

    start: float
    stop: float
    every: int

    def due(self, step: int, steps: int) -> bool:
        """Whether it moves after `step`, counted from 1, of `steps`."""
        first, last = self._span(steps)
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    def left(self, step: int, steps: int) -> float:
        """(1 - (t - t_0) / (t_1 - t_0))^3, exactly 1 before and 0 after."""
        first, last = self._span(steps)
        if step >= last:
            return 0.0
        return (1.0 - max(0, step - first) / (last - first)) ** 3

    def _span(self, steps: int) -> tuple[int, int]:
        # The last one comes before the last step, so that no model ends untrained at its final sparsity.
        last = max(1, min(math.floor(self.stop * steps), steps - 1))
        return min(max(1, math.ceil(self.start * steps)), last), last
