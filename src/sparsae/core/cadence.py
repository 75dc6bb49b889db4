"""When something happens, and how a quantity moves over a run: values and pure functions of the step.

Steps are counted from 1; a span is a number of steps, a share of the run or epochs (`config.span`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sparsae.config.span import Horizon, require_share, require_span, span_steps
from sparsae.errors import InputError


def rate_factor(
    step: int,
    steps: int,
    warmup: float,
    final: float,
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine",
    decay: float = 1.0,
) -> float:
    """Multiplier of the peak learning rate at `step` of `steps`, counted from 0.

    With w = warmup * steps: (step + 1) / w while step < w, then final + (1 - final) f(t), where f falls from 1 to 0 as
    a cosine or a line and t goes from 0 to 1 over the remaining steps; 1 throughout in "constant". "wsd" (warm-up,
    stable, decay; Hu et al., 2024) stays at 1, and falls as a line over the last decay * steps. Never 0 at the first
    step.
    """
    warm_steps = round(warmup * steps)
    if step < warm_steps:
        return (step + 1) / warm_steps
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        stable = max(warm_steps, steps - 1 - round(decay * steps))
        return final + (1.0 - final) * decayed("linear", _share(step, stable, steps))
    return final + (1.0 - final) * decayed(schedule, _share(step, warm_steps, steps))


def _share(step: int, start: int, steps: int) -> float:
    """How much of the way from `start` to the last step is over at `step`: 0 before, 1 after."""
    return min(1.0, max(0, step - start) / max(1, steps - 1 - start))


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


class Cadence(ABC):
    """When updates happen."""

    @abstractmethod
    def due(self, step: int, horizon: Horizon) -> bool:
        """Whether one follows `step`."""

    def steps(self, horizon: Horizon) -> Iterator[int]:
        """The steps of a run that one follows, in order; a cadence that knows them need not ask at every step."""
        return (step for step in range(1, horizon.steps + 1) if self.due(step, horizon))

    def left(self, step: int, horizon: Horizon) -> float:
        """Share of the way from where something is to where it shall be that remains after `step`: of what prunes."""
        return 1.0

    def interval(self, horizon: Horizon) -> int:
        """Steps between two updates: a period, or what lies between the first two, or from the one to the run's end."""
        due = self.steps(horizon)
        first, second = next(due, horizon.steps), next(due, horizon.steps)
        return max(1, second - first)


@dataclass(frozen=True)
class Never(Cadence):
    """No update at all."""

    def due(self, step: int, horizon: Horizon) -> bool:
        return False

    def steps(self, horizon: Horizon) -> Iterator[int]:
        return iter(())


# Steps between updates whose cadence is a share of the run, however short that is: what has grown has to learn before
# it is judged.
LEAST = 10


def _between(every: int | str, horizon: Horizon, least: int = LEAST) -> int:
    steps = span_steps(every, horizon)
    return max(least, steps) if isinstance(every, str) else steps


@dataclass(frozen=True)
class Periodic(Cadence):
    """Every so many steps, after the share `start` and before the share `stop` of the run, and before its last step.

    at_stop: an update may fall on the step at which `stop` is reached. Of a share of the run it is at least ten steps.
    Raises InputError where `every` is no span, or `start` or `stop` no share.
    """

    every: int | str
    start: float = 0.0
    stop: float = 1.0
    at_stop: bool = False

    def __post_init__(self) -> None:
        require_span(self.every)
        require_share(start=self.start, stop=self.stop)

    def due(self, step: int, horizon: Horizon) -> bool:
        steps = horizon.steps
        last = self.stop * steps
        inside = self.start * steps < step < steps and (step < last or (self.at_stop and step <= last))
        return step % self.interval(horizon) == 0 and inside

    def steps(self, horizon: Horizon) -> Iterator[int]:
        every = self.interval(horizon)
        return (step for step in range(every, horizon.steps, every) if self.due(step, horizon))

    def interval(self, horizon: Horizon) -> int:
        return _between(self.every, horizon)


@dataclass(frozen=True)
class Once(Cadence):
    """After the share `at` of the run, once; then nothing of the way is left. Raises InputError where it is none."""

    at: float

    def __post_init__(self) -> None:
        require_share(at=self.at)

    def due(self, step: int, horizon: Horizon) -> bool:
        return step == self._step(horizon)

    def steps(self, horizon: Horizon) -> Iterator[int]:
        return iter([self._step(horizon)])

    def left(self, step: int, horizon: Horizon) -> float:
        return 0.0 if step >= self._step(horizon) else 1.0

    def _step(self, horizon: Horizon) -> int:
        return max(1, math.floor(self.at * horizon.steps))


@dataclass(frozen=True)
class Cubic(Cadence):
    """A quantity that falls from where it is to where it shall be (Zhu & Gupta, 2017):

        x_t = x_end + (x_start - x_end) (1 - (t - t_0) / (t_1 - t_0))^3          for t_0 <= t <= t_1,

    t_0 and t_1 being `start` and `stop` as shares of the steps. It moves every `every` steps from t_0 on (of a share of
    the run at least `least`), and at t_1. Raises InputError where `every` is no span, or `start` or `stop` no share.
    """

    start: float
    stop: float
    every: int | str
    least: int = LEAST

    def __post_init__(self) -> None:
        require_span(self.every)
        require_share(start=self.start, stop=self.stop)

    def due(self, step: int, horizon: Horizon) -> bool:
        """Whether it moves after `step`."""
        first, last = self.span(horizon)
        every = _between(self.every, horizon, self.least)
        return first <= step <= last and ((step - first) % every == 0 or step == last)

    def steps(self, horizon: Horizon) -> Iterator[int]:
        first, last = self.span(horizon)
        yield from (step for step in range(first, last, _between(self.every, horizon, self.least)) if step)
        yield last

    def left(self, step: int, horizon: Horizon) -> float:
        """(1 - (t - t_0) / (t_1 - t_0))^3, exactly 1 before and 0 after."""
        first, last = self.span(horizon)
        if step >= last:
            return 0.0
        return (1.0 - max(0, step - first) / (last - first)) ** 3

    def begun(self, step: int, horizon: Horizon) -> bool:
        """Whether anything of the way is over after `step`."""
        first, last = self.span(horizon)
        return step > first or step >= last

    def span(self, horizon: Horizon) -> tuple[int, int]:
        """The steps after which it begins and ends to move."""
        steps = horizon.steps
        # The last one is before the last step, so that no model ends untrained at its final sparsity.
        last = max(1, min(math.floor(self.stop * steps), steps - 1))
        # From a start of 0 the first one is after `every` steps, not at once: nothing has been learned yet.
        return min(math.ceil(self.start * steps), last), last


@dataclass(frozen=True)
class Window:
    """The steps before an update whose gradients are averaged for it: every `every`-th of the last `steps`.

    The last is the one that the update follows. A window never reaches behind the update, or the move of a density
    schedule, before: connections are others there. Raises InputError where `steps` is no span, or `every` no number of
    steps.
    """

    steps: int | str = 1
    every: int = 1

    def __post_init__(self) -> None:
        require_span(self.steps)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"every: must be a number of steps of at least 1, not {self.every!r}")

    def length(self, horizon: Horizon) -> int:
        """Steps from the first that may be averaged to the last."""
        return span_steps(self.steps, horizon)

    def holds(self, step: int, due: int) -> bool:
        """Whether `step`, which is inside, is one of those averaged for the update that follows step `due`."""
        return (due - step) % self.every == 0

    def count(self, gap: int, horizon: Horizon) -> int:
        """How many steps are averaged for an update `gap` steps after the one before (or after the start)."""
        return -(-min(gap, self.length(horizon)) // self.every)


LAST_STEP = Window()
