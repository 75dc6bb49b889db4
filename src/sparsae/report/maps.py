"""Heatmaps of layers, and of attention heads, through time: what was in force at each step, one row a layer or head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from sparsae.report.data import RunData
from sparsae.report.readable import compact, percent, short_names
from sparsae.report.svg import COLOURS, Array, Panel, numbered, panel
from sparsae.search.rows import LayerRow

_COLUMNS: Final = 160  # of a map of few rows
_CELLS: Final = 48_000  # of a map of many, while it has a quarter of these columns
_LEVELS: Final = 32  # of colour, so that the image compresses well
_LABELS: Final = 48  # rows that still have a name each
_LONGEST: Final = 40  # characters of a name beside its row
# Orange for less, blue for more, and the paper itself for no change: legible on light and on dark.
_LESS, _MORE = (0.84, 0.42, 0.0), (0.13, 0.5, 0.8)
_CHANGE: Final = LinearSegmentedColormap.from_list(
    "change", [(0.0, (*_LESS, 1.0)), (0.5, (*_LESS, 0.0)), (0.5, (*_MORE, 0.0)), (1.0, (*_MORE, 1.0))]
)


def density(run: RunData) -> Panel | None:
    """Density of each layer at each step."""
    values = _through_time(run, lambda layer: (layer.density,))
    return _map(run, "density", "Density of each layer", "share of a layer's weights", values, _names(run), percent)


def density_change(run: RunData) -> Panel | None:
    """Density of each layer relative to the first topology; None where no layer's density has moved."""
    values = _through_time(run, lambda layer: (layer.density,))
    if not values.size:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        change = values / values[:, :1] - 1
    if not np.abs(np.nan_to_num(change)).max(initial=0.0) > 1e-3:
        return None
    return _map(
        run,
        "density-change",
        "Change since the first step",
        "relative to the start",
        change,
        _names(run),
        percent,
        signed=True,
    )


def heads(run: RunData) -> Panel | None:
    """Density of every attention head's slice of its projections at each step."""
    first = run.topologies[0].layers if run.topologies else {}
    names = [name for name in run.layers if first[name].head_densities]
    if not names:
        return None
    ends = np.cumsum([len(first[name].head_densities or ()) for name in names]).tolist()
    labels = [(a, b, short_names(run.layers)[name]) for a, b, name in zip([0, *ends], ends, names, strict=False)]
    values = _through_time(run, lambda layer: layer.head_densities or (), names)
    title, unit = "Density of each attention head", "share of a head's weights"
    return _map(run, "heads", title, unit, values, labels, percent)


def gradient_activity(run: RunData) -> Panel | None:
    """L2 norm of the gradient at each layer's active weights, as each update saw it."""
    values = _through_time(run, lambda layer: (layer.gradient_activity,))
    title, unit = "Gradient activity of each layer", "L2 norm at active weights"
    return _map(run, "gradient-activity", title, unit, values, _names(run), compact, log=True)


def dead_outputs(run: RunData) -> Panel | None:
    """Share of each layer's outputs without an active weight; None where there never was one."""
    values = _through_time(run, lambda layer: (layer.dead_outputs,))
    if not np.nan_to_num(values).max(initial=0.0) > 0:
        return None
    title, unit = "Dead outputs of each layer", "rows without an active weight"
    return _map(run, "dead-outputs", title, unit, values, _names(run), compact)


def _names(run: RunData) -> list[tuple[int, int, str]]:
    return [(i, i + 1, label) for i, label in enumerate(short_names(run.layers).values())]


def _through_time(
    run: RunData, values: Callable[[LayerRow], Sequence[float]], names: Sequence[str] | None = None
) -> Array:
    """(rows, columns): the values of each layer, row after row, as they were in the middle of equal spans of steps."""
    names = run.layers if names is None else names
    if not names:
        return np.empty((0, 0))
    steps = [topology.step for topology in run.topologies]
    seen = [[value for name in names for value in values(topology.layers[name])] for topology in run.topologies]
    columns = min(_COLUMNS, max(_COLUMNS // 4, _CELLS // len(seen[0])))
    middles = (np.arange(columns) + 0.5) * max(run.last_step, 1) / columns
    in_force = np.maximum(np.searchsorted(steps, middles, side="right") - 1, 0)
    return np.asarray(seen, dtype=np.float64).T[:, in_force]


def _map(
    run: RunData,
    name: str,
    title: str,
    unit: str,
    values: Array,
    labels: Sequence[tuple[int, int, str]],
    written: Callable[[float], str],
    *,
    signed: bool = False,
    log: bool = False,
) -> Panel | None:
    """`labels` name groups of rows, (first, after the last, name)."""
    if not np.isfinite(values).any():
        return None
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    norm = _norm(low, high, signed, log and low > 0)
    rows = len(values)
    labels = [(first, end, _end_of(label)) for first, end, label in labels]
    inches = min(8.0, max(1.2, 0.16 * rows if rows == len(labels) else max(0.16 * len(labels), 0.045 * rows)))

    def draw(figure: Figure) -> None:
        width, height = figure.get_size_inches()
        left, right, bottom = 0.12 + 0.068 * max(len(label) for *_, label in labels), 0.12, 0.42
        box = (left / width, bottom / height, (width - left - right) / width, inches / height)
        ax = figure.add_axes(box)
        # One level more where the middle, which is no change, needs one of its own.
        cmap = _CHANGE.resampled(_LEVELS + 1) if signed else colormaps["cividis"].resampled(_LEVELS)
        ax.imshow(values, cmap=cmap, norm=norm, aspect="auto", extent=(0, max(run.last_step, 1), rows, 0))
        every = -(-len(labels) // _LABELS)
        shown = labels[::every]
        ax.set_yticks([(first + end) / 2 for first, end, _ in shown], [label for *_, label in shown], fontsize=7)
        for first, *_ in labels[1:] if rows > len(labels) else ():
            ax.axhline(first, color=COLOURS["paper"], linewidth=1.0)
        ax.set_xlabel("step")
        numbered(ax.xaxis, 6)
        _scale(figure, norm, cmap, unit, written, (left, height - 0.36, width - left - right))

    text = f"Heatmap of {rows} rows against steps: {unit}, from {written(low)} to {written(high)}."
    if rows <= 24 and rows == len(labels):
        last = ", ".join(f"{label} {written(row[-1])}" for (*_, label), row in zip(labels, values, strict=True))
        text += f" At the end: {last}."
    return panel(name, title, text, draw, height=inches + 0.42 + 0.5)


def _end_of(label: str) -> str:
    """A label that leaves room for the map: of a long name its end, which differs."""
    return label if len(label) <= _LONGEST else f"…{label[1 - _LONGEST :]}"


def _scale(
    figure: Figure,
    norm: Normalize,
    cmap: Colormap,
    unit: str,
    written: Callable[[float], str],
    place: tuple[float, float, float],
) -> None:
    """The colour scale as a bar above the map, `place` (left, bottom, width) in inches: one small image."""
    width, height = figure.get_size_inches()
    left, bottom, length = place
    bar = figure.add_axes(((left + 0.4 * length) / width, bottom / height, 0.6 * length / width, 0.08 / height))
    gradient = norm.inverse(np.linspace(0, 1, 128))[None, :]
    bar.imshow(gradient, cmap=cmap, norm=norm, aspect="auto", extent=(0, 1, 0, 1))
    ends = np.asarray(norm.inverse([0.0, 0.5, 1.0]), dtype=float)
    for at, end, side in zip((0.0, 0.5, 1.0), ends, ("left", "center", "right"), strict=True):
        bar.text(at, 1.7, written(end), ha=side, va="bottom", fontsize=7)
    bar.set_axis_off()
    figure.text(0.02 / width, (bottom + 0.04) / height, unit, va="center")


def _norm(low: float, high: float, signed: bool, log: bool) -> Normalize:
    if signed:
        reach = max(abs(low), abs(high))
        return Normalize(-reach, reach)
    if log and high > 3 * low:
        return LogNorm(low, high)
    if high - low < 1e-6 * max(abs(high), 1e-12):
        return Normalize(0.0, high or 1.0)
    return Normalize(low, high)
