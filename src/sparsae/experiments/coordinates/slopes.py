"""How scales depend on density and on width: slopes of logarithms, and which of them are as they should be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from sparsae.experiments.coordinates.measure import LOGITS, Scale
from sparsae.experiments.coordinates.plan import Case
from sparsae.experiments.coordinates.record import Axis, Point, Quantity, Row, SummaryRow

TOLERANCE = 0.1


def slope(points: Iterable[tuple[float, float]]) -> float | None:
    """Least squares slope of log y on log x; None where fewer than two x differ."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def wanted(axis: Axis, quantity: str, layer: str) -> float:
    """The slope of a parameterization that keeps every layer learning at the same pace.

    0, but for gradients over width: with logits divided by the width those of hidden features fall with it.
    """
    return -1.0 if (axis, quantity) == ("width", "gradient") and layer != LOGITS else 0.0


def slopes(measured: Mapping[Case, Sequence[Scale]], least_fan_in: float = 0.0) -> tuple[Row, ...]:
    """A row a parameterization, axis, width or sparsity held fixed, layer, quantity and step.

    A point is the mean of the log scale over the seeds; seeds in which it is 0 or was not reached are left out, and
    layers whose outputs sum fewer than `least_fan_in` weights, on average.
    """
    points = _points(measured, least_fan_in)
    rows = []
    for axis in get_args(Axis):
        groups: dict[tuple[str, float, str, Quantity, int], list[Point]] = {}
        for (parameterization, layer, quantity, step), point in points:
            held = point.width if axis == "density" else point.sparsity
            groups.setdefault((parameterization, held, layer, quantity, step), []).append(point)
        for (parameterization, _, layer, quantity, step), mine in groups.items():
            found = slope((point.density if axis == "density" else point.width, point.scale) for point in mine)
            if found is None:
                continue
            aim = wanted(axis, quantity, layer)
            rows.append(
                Row(
                    parameterization=parameterization,
                    axis=axis,
                    width=mine[0].width if axis == "density" else None,
                    sparsity=None if axis == "density" else mine[0].sparsity,
                    layer=layer,
                    quantity=quantity,
                    step=step,
                    slope=found,
                    wanted=aim,
                    within=abs(found - aim) <= TOLERANCE,
                    points=tuple(mine),
                )
            )
    return tuple(rows)


def without_slope(measured: Mapping[Case, Sequence[Scale]], rows: Sequence[Row]) -> tuple[str, ...]:
    """Layers that were measured and have no slope over density, though densities differ."""
    if len({case.sparsity for case in measured}) < 2:
        return ()
    layers = dict.fromkeys(scale.layer for scales in measured.values() for scale in scales)
    have = {row.layer for row in rows if row.axis == "density"}
    return tuple(layer for layer in layers if layer not in have)


def summary(rows: Sequence[Row]) -> tuple[SummaryRow, ...]:
    """An entry a parameterization, axis and quantity: what its slopes are over layers, steps and whatever is fixed."""
    entries = []
    for name in dict.fromkeys(row.parameterization for row in rows):
        for axis in get_args(Axis):
            for quantity in get_args(Quantity):
                mine = [row for row in rows if (row.parameterization, row.axis, row.quantity) == (name, axis, quantity)]
                if not mine:
                    continue
                found = [row.slope for row in mine]
                entries.append(
                    SummaryRow(
                        parameterization=name,
                        axis=axis,
                        quantity=quantity,
                        wanted=min(row.wanted for row in mine),
                        slopes=len(found),
                        smallest=min(found),
                        median=statistics.median(found),
                        largest=max(found),
                        share_within=sum(row.within for row in mine) / len(mine),
                    )
                )
    return tuple(entries)


def _points(
    measured: Mapping[Case, Sequence[Scale]], least_fan_in: float
) -> list[tuple[tuple[str, str, Quantity, int], Point]]:
    """Each with its parameterization, layer, quantity and step."""
    groups: dict[tuple[str, int, float, str, Quantity, int], list[Scale]] = {}
    for case, found in measured.items():
        for scale in found:
            if 0 < scale.scale < math.inf and scale.fan_in >= least_fan_in:
                key = (case.parameterization, case.width, case.sparsity, scale.layer, scale.quantity, scale.step)
                groups.setdefault(key, []).append(scale)
    return [
        (
            (parameterization, layer, quantity, step),
            Point(
                width=width,
                sparsity=sparsity,
                density=statistics.geometric_mean([scale.density for scale in mine]),
                scale=statistics.geometric_mean([scale.scale for scale in mine]),
            ),
        )
        for (parameterization, width, sparsity, layer, quantity, step), mine in groups.items()
    ]
