"""The measurements as plots: one SVG file that stands by itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from statistics import geometric_mean

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparsae.bench.rows import Row, groups

_STYLE = {
    "svg.hashsalt": "sparsae",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


def kernels(rows: Sequence[Row]) -> str:
    """Ratio to dense over sparsity, a curve for each backend, unit and the like; geometric means over the layers."""
    keys = ["backend", "unit", "tokens", "dtype", "threads"]
    told = [key for key in keys if key == "backend" or len({row[key] for row in rows}) > 1]
    colours = {case: f"C{index}" for index, case in enumerate(groups(rows, told))}
    with rc_context(_STYLE):  # type: ignore[arg-type]
        passes = groups(rows, ["pass"])
        figure, panels = _figure([name for (name,) in passes], "sparsity", legend=1.6)
        shown: dict[str, Artist] = {}
        for ((name,), chosen), ax in zip(passes.items(), panels, strict=True):
            for case, group in groups(chosen, told).items():
                ratios = {at: [row["ratio"] for row in same] for (at,), same in groups(group, ["sparsity"]).items()}
                places = sorted(ratios)
                means = [geometric_mean(ratios[place]) for place in places]
                (line,) = ax.plot([f"{place:g}" for place in places], means, marker="o", color=colours[case])
                shown.setdefault(" ".join(map(str, case)), line)
            ax.axhline(1.0, color="black", linewidth=0.8)
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.set_title(name)
        panels[0].set_ylabel("times as fast as dense")
        figure.legend(list(shown.values()), list(shown), loc="outside right upper")
        return _svg(figure)


def steps(rows: Sequence[Row]) -> str:
    """Ratio to dense of training steps and of decoding, and updates in steps, as bars."""
    titles = {"step": "training, × dense", "decode": "decoding, × dense", "update": "an update, in steps"}
    with rc_context(_STYLE):  # type: ignore[arg-type]
        kinds = groups([row for row in rows if row["what"] in titles], ["what"])
        figure, panels = _figure([what for (what,) in kinds], "")
        for ((what,), chosen), ax in zip(kinds.items(), panels, strict=True):
            labels = [f"{row['backend']}\n{row['sparsity']:g}" for row in chosen]
            ax.bar(labels, [row["steps" if what == "update" else "ratio"] for row in chosen], width=0.6)
            ax.set_xlim(-0.8, len(chosen) - 0.2)
            ax.set_title(titles[what])
            if what != "update":
                ax.axhline(1.0, color="black", linewidth=0.8)
        return _svg(figure)


def topology(rows: Sequence[Row]) -> str:
    """Seconds of an update over nnz, with a line of slope 1 for the eye, and for each active weight over the width."""
    colours = {kind: f"C{index}" for index, (kind,) in enumerate(groups(rows, ["update"]))}
    styles = dict(zip(sorted({row["sparsity"] for row in rows}), cycle(["-", "--", ":", "-."]), strict=False))
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure, (whole, each) = _figure(["", ""], "active weights", legend=1.6)
        for (kind, sparsity), group in groups(rows, ["update", "sparsity"]).items():
            ordered = sorted(group, key=lambda row: row["nnz"])
            look = {"marker": "o", "markersize": 3.5, "color": colours[kind], "linestyle": styles[sparsity]}
            whole.loglog(*zip(*((row["nnz"], row["seconds"]) for row in ordered), strict=True), **look)
            share = [(row["width"], 1e9 * row["seconds"] / row["nnz"]) for row in ordered]
            each.loglog(*zip(*share, strict=True), label=f"{kind}, {100 * sparsity:g} % sparse", **look)
        first, last = min(row["nnz"] for row in rows), max(row["nnz"] for row in rows)
        slowest = max(rows, key=lambda row: row["seconds"])
        linear = [slowest["seconds"] * nnz / slowest["nnz"] for nnz in (first, last)]
        whole.loglog([first, last], linear, color="black", linewidth=0.8, label="linear")
        whole.set_ylabel("seconds an update")
        each.set_ylabel("nanoseconds an update and active weight")
        each.set_xlabel("width")
        figure.legend(loc="outside right upper")
        return _svg(figure)


def roofline(rows: Sequence[Row]) -> str:
    """Attainable operations a second over operations a byte."""
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure, (ax,) = _figure([""], "operations a byte")
        intensity = np.logspace(-2, 3, 200)
        for row in rows:
            reach = np.minimum(row["flops_per_second"], intensity * row["bytes_per_second"])
            ax.loglog(intensity, reach, label=f"{row['isa']}, {row['threads']} threads")
        ax.set_ylabel("float32 operations a second")
        ax.legend()
        return _svg(figure)


def _figure(panels: Sequence[str], x: str, legend: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1.0 + legend + 4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax in axes:
        ax.set_xlabel(x)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
