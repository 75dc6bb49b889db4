"""A density schedule: how many connections each layer has during a run, beside a rule that by itself keeps them.

Every layer is on its way between two numbers of units, `first` and `last`. The level says where: at 1 it has `first`,
at 0 `last`, in between last + round(level (first - last)). The level falls by the cubic of Zhu & Gupta (2017), and of a
schedule that restores rises by it again, mirrored:

    falls:  level_t = (1 - (t - t_0) / (t_1 - t_0))^3
    rises:  level_t = 1 - (1 - (t - t_2) / (t_3 - t_2))^3

It moves at the schedule's own steps only. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparsae.config.schedule import ScheduleConfig
from sparsae.config.span import Horizon
from sparsae.core.budgets import shrunk
from sparsae.core.cadence import Cubic

Ends = Mapping[str, tuple[int, int]]  # by layer: units at level 1 and at level 0


@dataclass(frozen=True)
class Schedule:
    """When and how far density moves. falls, rises: None where it never does.

    with_updates: it falls at the rule's updates, so that what has just grown is not judged between two of them.
    """

    falls: Cubic | None = None
    rises: Cubic | None = None
    with_updates: bool = False
    factor: float = 1.0

    @classmethod
    def of(cls, config: ScheduleConfig, rule_moves: bool) -> Schedule:
        """rule_moves: whether the rule beside it has updates, with which density may move."""
        if not config.moves:
            return cls()
        full = config.in_full
        with_updates, every = full.every is None and rule_moves, full.every or "1%"
        falls, rises = (
            None if first is None or last is None else Cubic(first, last, each, least=1)
            for first, last, each in (
                (full.start, full.stop, 1 if with_updates else every),
                (full.rise_start, full.rise_stop, every),
            )
        )
        return cls(falls, rises, with_updates, full.factor or 1.0)

    @property
    def moves(self) -> bool:
        """Whether density is not the same throughout."""
        return self.falls is not None

    def due(self, step: int, horizon: Horizon, updates: bool) -> bool:
        """Whether density moves after `step`, counted from 1, which the rule's own update follows or not."""
        if self.falls is None:
            return False
        if self.falls.due(step, horizon):
            return not self.with_updates or updates or self.falls.left(step, horizon) == 0
        return self.rises is not None and self.rises.due(step, horizon)

    def steps(self, horizon: Horizon, updates: Iterable[int]) -> list[int]:
        """The steps after which density moves, in order; updates: those that the rule's own updates follow."""
        if self.falls is None:
            return []
        own = set(updates)
        falls = {*own, self.falls.span(horizon)[1]} if self.with_updates else self.falls.steps(horizon)
        rises = () if self.rises is None else self.rises.steps(horizon)
        return [step for step in sorted({*falls, *rises}) if self.due(step, horizon, step in own)]

    def level(self, step: int, horizon: Horizon, now: float) -> float:
        """The level after `step` where it has been `now`: a run that was made longer keeps what it has reached."""
        if self.falls is None:
            return now
        if self.rises is not None and self.rises.begun(step, horizon):
            return max(now, 1.0 - self.rises.left(step, horizon))
        return min(now, self.falls.left(step, horizon))

    def moments(self, horizon: Horizon) -> list[int]:
        """The steps after which it begins and ends to fall, and to rise."""
        return [step for cubic in (self.falls, self.rises) if cubic is not None for step in cubic.span(horizon)]

    def ends(self, first: Mapping[str, int], last: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Each layer's units at level 1 and at level 0, of a run that begins with `first` and ends with `last`."""
        if not self.moves:
            return {}
        if self.rises is None:
            return {name: (first[name], last[name]) for name in first}
        return {name: (last[name], max(1, round(self.factor * last[name]))) for name in first}


CONSTANT = Schedule()


def counts_at(ends: Ends, level: float) -> dict[str, int]:
    """Units of each layer at a level."""
    return {name: shrunk(first, last, level) for name, (first, last) in ends.items()}
