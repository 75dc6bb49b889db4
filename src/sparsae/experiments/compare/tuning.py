"""How a variant finds its settings: along one axis after another, each extended until its best value lies inside.

The first axis is the learning rate's. On each, every value is tried with the best of the other settings that is known
by then, and the lowest validation loss decides. A best value at an end of its axis may be far from the best there is:
the next one beyond it, by the ratio of the last two, is tried as well, until the best one has neighbours on both sides
or the setting can have no further value.
What is tried follows from the losses alone, so an experiment that was stopped continues as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sparsae.config.ranges import NUMBERS, Range

Point = Mapping[str, float]
"""Dotted settings and their values; what is not named is as the plan says."""
Key = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Axis:
    """A setting and the values of its grid, two or more, in order; range: all values that it may have."""

    setting: str
    values: tuple[float, ...]
    range: Range = NUMBERS


@dataclass
class Look:
    """One look along an axis, at `around`: the values tried, in order, those added beyond the grid, and the best."""

    setting: str
    around: Point
    values: list[float]
    added: list[float] = field(default_factory=list)
    best: float | None = None
    """None: the value that the settings had without the axis is better than all of it."""
    at_edge: bool = False

    def point(self, value: float) -> Point:
        """With the axis at a value."""
        return {**self.around, self.setting: value}

    def points(self) -> list[Point]:
        """One a value."""
        return [self.point(value) for value in self.values]


@dataclass(frozen=True)
class Found:
    """What is known so far: the best point, the looks that led to it, and the points to try before there is more."""

    point: Point
    looks: Sequence[Look]
    wanted: Sequence[Point]

    def tried(self) -> list[Point]:
        """Every point that was looked at or is wanted, once, in order."""
        return list({key_of(point): point for look in self.looks for point in look.points()}.values())


def key_of(point: Point) -> Key:
    """The same for equal points."""
    return tuple(sorted(point.items()))


def search(
    axes: Sequence[Axis],
    rounds: int,
    extensions: int,
    loss: Callable[[Point], float | None],
    allowed: Callable[[Point], bool],
) -> Found:
    """As far as the known losses carry (None: not known; infinite: the trial failed).

    rounds: how many times all axes are looked along. extensions: how many values a look may add to its axis. allowed:
    whether a point beyond a grid has settings that a run can have.
    """
    point: Point = {}
    looks: list[Look] = []
    for axis in list(axes) * rounds:
        earlier = next((look for look in reversed(looks) if look.setting == axis.setting), None)
        look = Look(axis.setting, {k: v for k, v in point.items() if k != axis.setting}, list(axis.values))
        looks.append(look)
        for wanted in _along(look, axis.range, extensions, loss, allowed):
            return Found(point, looks, wanted)
        before = loss(look.around)
        if look.best is not None and before is not None and before < _known(loss, look.point(look.best)):
            look.best, look.at_edge = None, False
        if earlier is not None and _known(loss, point) < min(_known(loss, each) for each in look.points()):
            # What an earlier round found beyond the grid, which this one may not reach.
            look.best, look.at_edge = None, earlier.at_edge
            continue
        point = look.around if look.best is None else look.point(look.best)
    return Found(point, looks, ())


def _along(
    look: Look,
    possible: Range,
    extensions: int,
    loss: Callable[[Point], float | None],
    allowed: Callable[[Point], bool],
) -> Iterator[list[Point]]:
    """Complete a look; yields the points to try where it cannot be."""
    while True:
        if wanted := [point for point in look.points() if loss(point) is None]:
            yield wanted
        # Of equals the lower one; where every trial failed that is the lowest, beyond which it goes on.
        look.best = min(look.values, key=lambda value: (_known(loss, look.point(value)), value))
        look.at_edge = look.best in (look.values[0], look.values[-1])
        if not look.at_edge:
            return
        last, before = look.values[:2] if look.best == look.values[0] else (look.values[-1], look.values[-2])
        value = possible.beyond(last, before)
        if value is None:
            look.at_edge = False  # of the grid alone: the setting itself has nothing beyond
            return
        if len(look.added) == extensions or not allowed(look.point(value)):
            return
        look.values = sorted([*look.values, value])
        look.added.append(value)


def _known(loss: Callable[[Point], float | None], point: Point) -> float:
    known = loss(point)
    return math.inf if known is None else known
