"""The figures of a transfer experiment: basins, and where their lowest points lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sparsae.experiments.transfer.basins import mean_losses
from sparsae.experiments.transfer.plan import Knob
from sparsae.experiments.transfer.record import Optimum, Over, Row
from sparsae.experiments.transfer.results import LABELS, basin_of, by_cell
from sparsae.report.looks import Look, keys, looks
from sparsae.report.readable import in_short, sparsity_text
from sparsae.report.svg import COLOURS, Key, Panel, axes, panel


def basins(rows: Sequence[Row], optima: Sequence[Optimum], knob: Knob) -> list[Panel]:
    """A panel a parameterization, with one scale of losses: mean loss against the setting, by width and sparsity."""
    curves = {
        cell: dict(sorted(mean_losses(list(basin_of(mine, knob).values())).items()))
        for cell, mine in by_cell(rows).items()
    }
    known = [loss for curve in curves.values() for loss in curve.values() if loss is not None]
    if not known:
        return []
    look = looks([_name(width, sparsity) for _, width, sparsity in curves])
    limits = _limits(known)
    return [
        _basins(
            name, {cell[1:]: curve for cell, curve in curves.items() if cell[0] == name}, optima, knob, look, limits
        )
        for name in dict.fromkeys(name for name, _, _ in curves)
    ]


def optimum_by(optima: Sequence[Optimum], knob: Knob, over: Over) -> Panel | None:
    """The optimum against sparsity (or width): a line a parameterization and width (or sparsity)."""
    mine = [entry for entry in optima if entry.knob == knob]

    def place(entry: Optimum) -> float:
        return entry.sparsity if over == "sparsity" else entry.width

    places = sorted({place(entry) for entry in mine})
    if len(places) < 2:
        return None
    lines: dict[str, list[Optimum]] = {}
    for entry in mine:
        held = sparsity_text(entry.sparsity) if over == "width" else f"width {entry.width}"
        lines.setdefault(f"{entry.parameterization} · {held}", []).append(entry)
    names = dict.fromkeys(entry.parameterization for entry in mine)
    look = looks(list(lines))
    if len(names) > 1:  # a colour is a parameterization
        colour = {name: style.colour for name, style in looks(list(names)).items()}
        look = {line: replace(look[line], colour=colour[points[0].parameterization]) for line, points in lines.items()}

    def draw(figure: Figure) -> None:
        ax = axes(figure, LABELS[knob], x=over)
        for line, points in lines.items():
            style, points = look[line], sorted(points, key=place)
            x, y = [places.index(place(point)) for point in points], [point.optimum for point in points]
            ax.plot(x, y, color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker, markersize=4)
            for at, point in zip(x, points, strict=True):
                if point.interval:
                    ends = [point.interval.low, point.interval.high]
                    ax.plot([at, at], ends, color=COLOURS[style.colour], linewidth=1.0)
                if point.edge:
                    ax.plot([at], [point.optimum], "o", markersize=9, markerfacecolor="none",
                            markeredgecolor=COLOURS["ink"])  # fmt: skip
        ax.set_yscale("log", base=2)
        ax.set_ylim(*_octaves(ax.get_ylim()))
        ax.yaxis.set_major_formatter(lambda value, _: in_short(value))
        ax.set_xticks(range(len(places)), [sparsity_text(p) if over == "sparsity" else f"{p}" for p in places])
        ax.set_xlim(-0.3, len(places) - 0.7)

    text = "; ".join(
        f"{line}: {', '.join(format(point.optimum, '.3g') for point in points)}" for line, points in lines.items()
    )
    return panel(
        f"optimum-{knob.replace('_', '-')}-{over}",
        f"Best {LABELS[knob]} against {over}",
        f"Best {LABELS[knob]} against {over}: {text}.",
        draw,
        [*keys(look, list(lines)), Key("at an edge", "ink", "○")],
        height=3.4,
    )


def _basins(
    name: str,
    curves: Mapping[tuple[int, float], Mapping[float, float | None]],
    optima: Sequence[Optimum],
    knob: Knob,
    look: Mapping[str, Look],
    limits: tuple[float, float],
) -> Panel:
    best = [entry for entry in optima if (entry.knob, entry.parameterization) == (knob, name)]
    values = sorted({value for curve in curves.values() for value in curve})

    def draw(figure: Figure) -> None:
        ax = axes(figure, "nats per token", x=LABELS[knob])
        ax.set_xscale("log", base=2)
        for cell, curve in curves.items():
            style = look[_name(*cell)]
            x = list(curve)
            y = [np.nan if loss is None else loss for loss in curve.values()]
            ax.plot(x, y, color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker, markersize=3.5)
            gone = [value for value, loss in curve.items() if loss is None]
            ax.plot(gone, [limits[1]] * len(gone), "x", color=COLOURS[style.colour], markersize=5, clip_on=False)
        ax.plot([e.optimum for e in best], [e.loss for e in best], "o", markersize=8, markerfacecolor="none",
                markeredgecolor=COLOURS["ink"])  # fmt: skip
        ax.set_ylim(*limits)
        every = -(-len(values) // 7)
        ax.set_xticks(values[::every], [in_short(value) for value in values[::every]])
        ax.xaxis.set_minor_formatter(NullFormatter())

    text = "; ".join(f"width {e.width}, {sparsity_text(e.sparsity)}: {e.optimum:.3g}, loss {e.loss:.4f}" for e in best)
    return panel(
        f"basin-{knob.replace('_', '-')}-{name}",
        f"{name}: loss against {LABELS[knob]}",
        f"Validation loss against the {LABELS[knob]} under {name}; optima: {text}.",
        draw,
        [*keys(look, [_name(*cell) for cell in curves]), Key("optimum", "ink", "○"), Key("diverged", "muted", "×")],
        height=3.2,
    )


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """From the lowest loss to what all but the worst reach: a run that nearly diverged would flatten every basin."""
    low, high = min(losses), float(np.quantile(losses, 0.9))
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def _octaves(limits: tuple[float, float]) -> tuple[float, float]:
    """At least an octave to each side of the middle: an optimum that stays shall look as if it did."""
    low, high = limits
    middle = math.sqrt(low * high)
    return min(low, middle / 2), max(high, middle * 2)


def _name(width: int, sparsity: float) -> str:
    return f"{width}, {sparsity_text(sparsity)}"
