"""Where the best value of a setting lies, and how far it moves: parabolas through losses over its logarithm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sparsae.core.intervals import mean_interval
from sparsae.experiments.transfer.record import Bounds, Edge, Over

Cell = tuple[int, float]
"""Width and sparsity."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Basin:
    """The best value of a setting as a base 2 logarithm, the loss there, and where that is no minimum inside.

    edge: the best value tried is the "lowest" or "highest" one, or all that are higher diverged ("divergence"): then it
    is that value itself. None: a minimum between the two neighbours of the best value.
    """

    log2: float
    loss: float
    edge: Edge | None

    @property
    def value(self) -> float:
        """The best value."""
        return 2.0**self.log2


def fit_basin(losses: Mapping[float, float | None]) -> Basin | None:
    """The vertex of the parabola in log2(value) through the best value and its two neighbours.

    losses: value of the setting -> loss, None where a run diverged: such values are left out. The lower one of equally
    good values counts as the best. None where every run diverged.
    """
    known = [(math.log2(value), loss) for value, loss in sorted(losses.items()) if loss is not None]
    if not known:
        return None
    best = min(range(len(known)), key=lambda i: (known[i][1], i))
    if best == len(known) - 1:
        diverged = losses[max(losses)] is None
        return Basin(*known[best], "divergence" if diverged else "highest")
    if best == 0:
        return Basin(*known[best], "lowest")
    (a, f_a), (b, f_b), (c, f_c) = known[best - 1 : best + 2]
    before, after = (f_b - f_a) / (b - a), (f_c - f_b) / (c - b)
    curvature = (after - before) / (c - a)
    if curvature <= 0:  # three equal losses
        return Basin(b, f_b, None)
    # The derivative is `before` midway between a and b, and grows by 2 curvature.
    vertex = (a + b) / 2 - before / (2 * curvature)
    return Basin(vertex, f_a + before * (vertex - a) + curvature * (vertex - a) * (vertex - b), None)


def mean_losses(losses: Sequence[Mapping[Value, float | None]]) -> dict[Value, float | None]:
    """The mean over seeds at each value that all have; None where a run diverged with any of them."""
    shared = [value for value in losses[0] if all(value in mine for mine in losses)]
    means: dict[Value, float | None] = {}
    for value in shared:
        known = [loss for mine in losses if (loss := mine[value]) is not None]
        means[value] = math.fsum(known) / len(known) if len(known) == len(losses) else None
    return means


@dataclass(frozen=True)
class Movement:
    """How the optimum moves over sparsities or widths, the other one held fixed.

    factor: the largest ratio, over what is held fixed, of the highest to the lowest optimum. slope: of log2 optimum on
    log2 density or width, with an intercept for each fixed value; None where nothing varies. at_least: an optimum lies
    at an edge, so the factor may be larger.
    """

    factor: float
    slope: float | None
    at_least: bool


def movement(optima: Mapping[Cell, Basin], over: Over) -> Movement | None:
    """None where no two optima differ in nothing but sparsity (or width)."""
    varied, fixed = (1, 0) if over == "sparsity" else (0, 1)
    groups: dict[float, list[tuple[Cell, Basin]]] = {}
    for cell, basin in optima.items():
        groups.setdefault(cell[fixed], []).append((cell, basin))
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    spans, xs, ys = [], list[float](), list[float]()
    for group in groups.values():
        y = [basin.log2 for _, basin in group]
        x = [math.log2(1.0 - cell[varied] if over == "sparsity" else cell[varied]) for cell, _ in group]
        spans.append(max(y) - min(y))
        xs += list(np.asarray(x) - np.mean(x))
        ys += list(np.asarray(y) - np.mean(y))
    squares = math.fsum(x * x for x in xs)
    slope = math.fsum(x * y for x, y in zip(xs, ys, strict=True)) / squares if squares else None
    at_least = any(basin.edge for group in groups.values() for _, basin in group)
    return Movement(2.0 ** max(spans), slope, at_least)


def log2_interval(values: Sequence[float]) -> Bounds | None:
    """Student's interval of base 2 logarithms, as values again; None for fewer than two."""
    if len(values) < 2:
        return None
    found = mean_interval([math.log2(value) for value in values])
    assert found.low is not None
    assert found.high is not None
    return Bounds(n=found.n, low=2.0**found.low, high=2.0**found.high)
