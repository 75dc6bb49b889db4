"""The page and the table of a check of coordinates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import get_args

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sparsae import __version__
from sparsae.experiments.coordinates.record import Axis, Point, Quantity, Results, Row
from sparsae.report import markup
from sparsae.report.looks import keys, looks
from sparsae.report.readable import percent, sparsity_text
from sparsae.report.svg import COLOURS, Panel, axes, logarithmic, panel
from sparsae.report.tables import Table


def title(results: Results) -> str:
    """The page's heading."""
    return f"Coordinates · {results.asked.preset}"


def body(results: Results) -> str:
    """The page, but for its frame."""
    asked = results.asked
    lead = (
        f"{', '.join(asked.parameterizations)}, method {asked.method}, {asked.layers} blocks: the first "
        f"{asked.steps} steps at a learning rate of {asked.learning_rate:.4g}, {len(asked.seeds)} "
        f"seed{'s' if len(asked.seeds) > 1 else ''}."
    )
    table = slope_table(results)
    rows = [[" · ".join(row[:3]), *row[3:]] for row in table.rows]
    return "\n".join(
        [
            f'<header>\n<h1>{escape(title(results))}</h1>\n<p class="lead">{escape(lead)}</p></header>\n<main>',
            markup.notes(results.warnings),
            markup.section("slopes", "Slopes", _LEAD, markup.table(table.title, ["", *table.columns[3:]], rows)),
            *(_section(results, axis) for axis in get_args(Axis)),
            f"</main>\n<footer>Written by sparsae {escape(__version__)} from its own measurements.</footer>",
        ]
    )


def slope_table(results: Results) -> Table:
    """What the slopes are, by parameterization, axis and quantity."""
    rows = [
        [
            entry.axis,
            entry.quantity,
            entry.parameterization,
            f"{entry.wanted:+.0f}".replace("-", "−") if entry.wanted else "0",
            *(f"{slope:+.3f}".replace("-", "−") for slope in (entry.smallest, entry.median, entry.largest)),
            percent(entry.share_within),
        ]
        for entry in sorted(results.summary, key=lambda e: (e.axis, get_args(Quantity).index(e.quantity)))
    ]
    columns = ["over", "scale of", "parameterization", "wanted", "smallest", "median", "largest", "within"]
    heading = f"Slopes of log scale over layers and steps; within: no more than {results.tolerance:g} from wanted."
    return Table(heading, columns, rows, 3)


_LEAD = (
    "Scales are root mean squares over tokens and features of a layer's output (activation), of the loss's gradient "
    "with respect to it, and of what the last step changes of it for the same input (update). A slope is that of log "
    "scale on log density at one width, or on log width at one sparsity: where it is what is wanted, layers of any "
    "density and width learn at the same pace."
)


def _section(results: Results, axis: Axis) -> str:
    rows = [row for row in results.rows if row.axis == axis]
    if not rows:
        return ""
    held = "width" if axis == "density" else "sparsity"
    largest = max(row.held for row in rows)
    at = f"width {largest}" if axis == "density" else f"sparsity {sparsity_text(largest)}"
    blocks = []
    for quantity in get_args(Quantity):
        mine = [row for row in rows if row.quantity == quantity]
        names = list(dict.fromkeys(row.parameterization for row in mine))
        groups = {name: [row for row in mine if row.parameterization == name] for name in names}
        panels = [
            _scales([row for row in group if row.held == largest], name, axis, at) for name, group in groups.items()
        ]
        panels += [_slopes(group, name, axis) for name, group in groups.items()]
        blocks.append(f"<h3>{escape(quantity.capitalize())}</h3>{markup.figures(panels)}")
    lead = f"Scales after the last step at {at}, and slopes on the way, medians over every {held}."
    return markup.section(f"over-{axis}", f"Over {axis}", lead, *blocks)


def _scales(rows: Sequence[Row], name: str, axis: Axis, at: str) -> Panel | None:
    """The scale of every layer in the last step, against density or width."""
    if not rows:
        return None
    last = max(row.step for row in rows)
    lines = {row.layer: row for row in rows if row.step == last}
    look, quantity = looks(list(lines)), rows[0].quantity

    def draw(figure: Figure) -> None:
        ax = axes(figure, "root mean square", x=axis)
        for layer, row in lines.items():
            style = look[layer]
            points = sorted((_at(point, axis), point.scale) for point in row.points)
            ax.loglog(*zip(*points, strict=True), color=COLOURS[style.colour], linestyle=style.dash,
                      marker=style.marker, markersize=3.5)  # fmt: skip
        shown = _apart(sorted({_at(point, axis) for row in lines.values() for point in row.points}))
        ax.set_xticks(shown, [f"{value:.2g}" if axis == "density" else f"{value}" for value in shown])
        ax.xaxis.set_minor_formatter(NullFormatter())
        logarithmic(ax.yaxis)

    text = "; ".join(f"{layer} {row.slope:+.2f}" for layer, row in lines.items())
    heading = f"{name}: {quantity}, step {last}, {at}"
    return panel(
        f"scale-{quantity}-{axis}-{name}", heading, f"{heading}. Slopes: {text}.", draw, keys(look, list(lines)), 3.0
    )


def _apart(ticks: Sequence[float]) -> list[float]:
    """Of sorted numbers above 0 those whose labels have room on a logarithmic axis."""
    shown = list(ticks[:1])
    for value in ticks[1:]:
        if math.log(value / shown[-1]) > math.log(ticks[-1] / ticks[0]) / 8:
            shown.append(value)
    return shown


def _slopes(rows: Sequence[Row], name: str, axis: Axis) -> Panel | None:
    """The slope of every layer over the steps."""
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        lines.setdefault(row.layer, {}).setdefault(row.step, []).append(row.slope)
    medians = {layer: {s: statistics.median(v) for s, v in steps.items()} for layer, steps in lines.items()}
    look, quantity = looks(list(lines)), rows[0].quantity
    aim = min(row.wanted for row in rows)

    def draw(figure: Figure) -> None:
        ax = axes(figure, f"slope on log {axis}")
        ax.axhspan(aim - 0.1, aim + 0.1, color=COLOURS["grid"], linewidth=0)
        for layer, steps in medians.items():
            style = look[layer]
            ax.plot(list(steps), list(steps.values()), color=COLOURS[style.colour], linestyle=style.dash,
                    marker=style.marker, markersize=3)  # fmt: skip

    text = "; ".join(f"{layer} {list(steps.values())[-1]:+.2f}" for layer, steps in medians.items())
    heading = f"{name}: slope of the {quantity} over {axis}"
    return panel(
        f"slope-{quantity}-{axis}-{name}", heading, f"{heading}, at the last step: {text}.", draw,
        keys(look, list(lines)), 2.6,
    )  # fmt: skip


def _at(point: Point, axis: Axis) -> float:
    return point.density if axis == "density" else point.width
