"""The figures of a comparison: methods as lines and points, each in its own colour and mark throughout the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sparsae.experiments.compare.record import Loss, Row, SummaryRow, TuningRow
from sparsae.experiments.compare.summary import losses_of
from sparsae.report.data import RunData
from sparsae.report.looks import Look, keys
from sparsae.report.readable import compact, duration, in_short, percent, sparsity_text
from sparsae.report.svg import COLOURS, Key, Panel, axes, numbered, panel
from sparsae.runs.rows import TopologyRow

Against = Literal["train_flops", "tokens", "seconds"]
_UNITS = {"train_flops": "training FLOPs", "tokens": "training tokens", "seconds": "seconds"}
_PARTS = {"student": "student", "teacher": "teacher", "search": "search", "dense_gradients": "growth gradients"}


def loss_curves(rows: Sequence[Row], look: Mapping[str, Look], against: Against, sparsity: float) -> Panel | None:
    """Mean validation loss over seeds; bands reach from the best to the worst seed."""
    curves = {name: _curve(mine, against) for name, mine in _by_method(rows, sparsity).items()}
    curves = {name: found for name, found in curves.items() if len(found[0]) > 1}
    if not curves:
        return None
    early = [y[min(2, len(y) - 1)].max() for _, y in curves.values()]
    low = min(y.min() for _, y in curves.values())

    def draw(figure: Figure) -> None:
        ax = axes(figure, "nats per token", x=_UNITS[against])
        for name, (x, y) in curves.items():
            style = look[name]
            ax.fill_between(x, y.min(axis=1), y.max(axis=1), color=COLOURS[style.colour], alpha=0.15, linewidth=0)
            ax.plot(
                x, y.mean(axis=1), color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker, markersize=3
            )
        # The first steps fall so far that nothing else could be seen.
        margin = 0.04 * (max(early) - low) or 0.01
        ax.set_ylim(low - margin, max(early) + margin)
        ax.set_xlim(left=0)

    ends = "; ".join(f"{name} ends at {y[-1].mean():.4f}" for name, (_, y) in curves.items())
    unit = {"train_flops": "FLOPs", "tokens": "tokens", "seconds": "time"}[against]
    return panel(
        f"curve-{against.replace('_', '-')}-{_suffix(sparsity)}",
        f"Validation loss against {unit} · {sparsity_text(sparsity)} sparse",
        f"Validation loss in nats per token against {_UNITS[against]} at {sparsity_text(sparsity)} sparsity: {ends}.",
        draw,
        keys(look, list(curves)),
        height=3.0,
    )


def loss_by_sparsity(summary: Sequence[SummaryRow], look: Mapping[str, Look], loss: Loss) -> Panel | None:
    """Final loss of each method at each sparsity, with its 95 % interval over seeds."""
    sparsities = sorted({entry.sparsity for entry in summary})
    known = [(entry, interval) for entry in summary if (interval := entry.loss(loss)) is not None]
    if len(sparsities) < 2 or not known:
        return None
    names = list(dict.fromkeys(entry.method for entry, _ in known))

    def draw(figure: Figure) -> None:
        ax = axes(figure, "nats per token, 95 % interval", x="sparsity")
        for index, name in enumerate(names):
            style, mine = look[name], [(entry, interval) for entry, interval in known if entry.method == name]
            shift = 0.06 * (index - (len(names) - 1) / 2)
            x = [sparsities.index(entry.sparsity) + shift for entry, _ in mine]
            y = [interval.mean for _, interval in mine]
            error = [0.0 if interval.high is None else interval.high - interval.mean for _, interval in mine]
            ax.errorbar(
                x, y, yerr=error, color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker,
                markersize=4.5, linewidth=1.0, elinewidth=1.2, capsize=2.5,
            )  # fmt: skip
        ax.set_xticks(range(len(sparsities)), [sparsity_text(sparsity) for sparsity in sparsities])
        ax.set_xlim(-0.5, len(sparsities) - 0.5)

    text = "; ".join(f"{e.method} {interval.mean:.4f} at {sparsity_text(e.sparsity)}" for e, interval in known)
    return panel(
        "loss-by-sparsity",
        "Final loss against sparsity",
        f"Final {loss.replace('_', ' ')} against sparsity: {text}.",
        draw,
        keys(look, names),
        height=3.2,
    )


def differences(
    summary: Sequence[SummaryRow],
    rows: Sequence[Row],
    look: Mapping[str, Look],
    sparsity: float,
    reference: str,
    loss: Loss,
) -> Panel | None:
    """Each method's paired difference from the reference: the mean, its 95 % interval, and every seed."""
    entries = [(e, e.difference) for e in summary if e.sparsity == sparsity and e.difference is not None]
    if not entries:
        return None
    losses = losses_of((row for row in rows if row.sparsity == sparsity), loss)
    held = losses.get(reference, {})

    def draw(figure: Figure) -> None:
        width, height = figure.get_size_inches()
        left = 0.2 + 0.078 * max(len(entry.method) for entry, _ in entries)
        ax = figure.add_axes((left / width, 0.44 / height, (width - left - 0.15) / width, (height - 0.5) / height))
        for at, (entry, difference) in enumerate(entries):
            style, mine = look[entry.method], losses.get(entry.method, {})
            seeds = [mine[n] - held[n] for n in mine if n in held]
            ax.plot(seeds, [at + 0.22] * len(seeds), "|", color=COLOURS["muted"], markersize=5, markeredgewidth=0.9)
            if difference.low is not None and difference.high is not None:
                ax.plot([difference.low, difference.high], [at, at], color=COLOURS[style.colour], linewidth=1.6)
            ax.plot([difference.mean], [at], marker=style.marker, color=COLOURS[style.colour], markersize=5.5)
        ax.axvline(0, color=COLOURS["ink"], linewidth=0.8)
        ax.set_yticks(range(len(entries)), [entry.method for entry, _ in entries])
        ax.tick_params(axis="y", labelcolor=COLOURS["ink"])
        ax.set_ylim(len(entries) - 0.4, -0.6)
        ax.grid(axis="x")
        ax.set_xlabel(f"nats, difference from {reference} (left is better)")
        numbered(ax.xaxis, 5, signed=True)

    text = "; ".join(f"{e.method} {difference.mean:+.4f} ({e.verdict})" for e, difference in entries)
    return panel(
        f"difference-{_suffix(sparsity)}",
        f"Paired difference from {reference} · {sparsity_text(sparsity)} sparse",
        f"Paired difference of the final loss from {reference}'s at {sparsity_text(sparsity)} sparsity: {text}.",
        draw,
        [Key("mean and 95 % interval", "ink", "●"), Key("a seed", "muted", "|")],
        height=0.62 + 0.36 * len(entries),
    )


def tuning_curves(tuning: Sequence[TuningRow], look: Mapping[str, Look], sparsity: float, setting: str) -> Panel | None:
    """Loss of each trial against a setting, as tuning last looked along it; the chosen value is ringed."""
    last = {
        group.method: along[-1]
        for group in tuning
        if group.sparsity == sparsity and (along := [entry for entry in group.looks if entry.setting == setting])
    }
    curves = {
        name: [(x, y) for x, y in zip(entry.values, entry.losses, strict=True) if y is not None]
        for name, entry in last.items()
    }
    if not any(curves.values()):
        return None
    values = sorted({value for entry in last.values() for value in entry.values})
    name_of = setting.rpartition(".")[2].replace("_", " ")

    def draw(figure: Figure) -> None:
        ax = axes(figure, "nats per token", x=name_of)
        for name, curve in curves.items():
            style = look[name]
            if curve:
                ax.plot(
                    *zip(*curve, strict=True), color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker,
                    markersize=4,
                )  # fmt: skip
            for x, y in curve:
                if x == last[name].best:
                    ax.plot([x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=COLOURS["ink"])
        ax.set_xscale("log" if values[0] > 0 else "linear")
        ax.set_xticks(values, list(map(in_short, values)))
        ax.xaxis.set_minor_formatter(NullFormatter())

    chosen = {name: "its own" if entry.best is None else in_short(entry.best) for name, entry in last.items()}
    text = "; ".join(f"{name} chose {value}" for name, value in chosen.items())
    return panel(
        f"tuning-{setting.replace('.', '-').replace('_', '-')}-{_suffix(sparsity)}",
        f"Trials: {name_of} · {sparsity_text(sparsity)} sparse",
        f"Validation loss of the trials against the {name_of} at {sparsity_text(sparsity)} sparsity: {text}.",
        draw,
        [*keys(look, list(last)), Key("chosen", "ink", "○")],
        height=2.8,
    )


def cost_bars(rows: Sequence[Row], sparsity: float, unit: Literal["FLOPs", "time"]) -> Panel | None:
    """The mean cost of a run of each method, by part, as stacked bars."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, mine in _by_method(rows, sparsity).items():
        found = [row.train_flops_by_part if unit == "FLOPs" else row.seconds_by_part for row in mine]
        if known := [parts for parts in found if parts]:
            groups[name] = known
    if not groups:
        return None
    names = list(dict.fromkeys(part for parts in groups.values() for run in parts for part in run))
    means = {
        name: {p: float(np.mean([run.get(p, 0) for run in parts])) for p in names} for name, parts in groups.items()
    }
    names = [part for part in names if any(mean[part] > 0 for mean in means.values())]
    written = duration if unit == "time" else compact

    def draw(figure: Figure) -> None:
        width = figure.get_figwidth()
        left, right = 0.2 + 0.078 * max(map(len, means)), 0.75
        ax = figure.add_axes((left / width, 0.02, (width - left - right) / width, 0.96))
        for at, mean in enumerate(means.values()):
            start = 0.0
            for index, part in enumerate(names):
                ax.barh(at, mean[part], left=start, height=0.62, color=COLOURS[f"series{index % 8}"])
                start += mean[part]
            ax.annotate(
                written(start), (start, at), (4, 0), textcoords="offset points", va="center", color=COLOURS["ink"]
            )
        ax.set_yticks(range(len(means)), list(means))
        ax.tick_params(axis="y", labelcolor=COLOURS["ink"])
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.set_ylim(len(means) - 0.5, -0.5)

    text = "; ".join(f"{name}: {', '.join(f'{p} {written(mean[p])}' for p in names)}" for name, mean in means.items())
    labels = {part: _PARTS.get(part, part.replace("_", " ")) for part in names}
    return panel(
        f"cost-{unit.lower()}-{_suffix(sparsity)}",
        f"{'Training FLOPs' if unit == 'FLOPs' else 'Time'} of a run by part · {sparsity_text(sparsity)} sparse",
        f"Mean {unit} of a run by part at {sparsity_text(sparsity)} sparsity: {text}.",
        draw,
        [Key(labels[part], f"series{index % 8}", "■") for index, part in enumerate(names)],
        height=0.2 + 0.27 * len(means),
    )


Movement = Literal["turnover", "distance", "itop"]
_MOVEMENTS: Mapping[Movement, tuple[str, str, Callable[[TopologyRow], float]]] = {
    "turnover": ("Turnover", "share of connections that are new", lambda u: u.hamming_last),
    "distance": ("Distance to the first topology", "share of connections", lambda u: u.hamming_start),
    "itop": ("Positions ever active (ITOP rate)", "share of all positions", lambda u: u.itop_rate),
}


def telemetry(
    runs: Mapping[str, RunData],
    look: Mapping[str, Look],
    sparsity: float,
    kind: Movement,
) -> Panel | None:
    """How the topologies of one seed's runs move, against the share of the run that is done."""
    title, unit, value = _MOVEMENTS[kind]
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name, run in runs.items():
        rows = run.updates if kind == "turnover" else run.topologies
        if run.updates:
            lines[name] = ([u.step / max(1, run.last_step) for u in rows], list(map(value, rows)))
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        ax = axes(figure, unit, x="share of the run")
        for name, (x, y) in lines.items():
            style = look[name]
            ax.plot(x, y, color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker, markersize=3)
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        numbered(ax.xaxis, percent=True)
        numbered(ax.yaxis, percent=True)

    text = "; ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in lines.items())
    heading = f"{title} · {sparsity_text(sparsity)} sparse"
    return panel(f"{kind}-{_suffix(sparsity)}", heading, f"{title}: {text}.", draw, keys(look, list(lines)))


def layer_densities(runs: Mapping[str, RunData], look: Mapping[str, Look], sparsity: float) -> Panel | None:
    """The density of every sparse layer at the end of one seed's runs."""
    last: dict[str, TopologyRow] = {name: run.topologies[-1] for name, run in runs.items() if run.topologies}
    last = {name: topology for name, topology in last.items() if topology.layers}
    if not last:
        return None

    def draw(figure: Figure) -> None:
        ax = axes(figure, "density at the end", x="sparse layer, in the model's order")
        # Side by side, since equal densities would lie on each other.
        for place, (name, topology) in enumerate(last.items(), start=1):
            y = [layer.density for layer in topology.layers.values()]
            style, x = look[name], np.arange(len(y)) + 0.4 * (place / (len(last) + 1) - 0.5)
            ax.plot(
                x, y, color=COLOURS[style.colour], linestyle=style.dash, marker=style.marker, markersize=3,
                linewidth=1.0,
            )  # fmt: skip
        ax.set_ylim(bottom=0)
        numbered(ax.yaxis, percent=True)

    text = "; ".join(f"{n}: {', '.join(percent(x.density) for x in t.layers.values())}" for n, t in last.items())
    return panel(
        f"layers-{_suffix(sparsity)}",
        f"Density by layer · {sparsity_text(sparsity)} sparse",
        f"Density of the sparse layers in order: {text}.",
        draw,
        keys(look, list(last)),
    )


def _suffix(sparsity: float) -> str:
    """Makes a figure's name one of its sparsity's."""
    return f"{sparsity:g}".replace(".", "-")


def _by_method(rows: Sequence[Row], sparsity: float) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.sparsity == sparsity and not row.diverged:
            groups.setdefault(row.method, []).append(row)
    return groups


def _curve(rows: Sequence[Row], against: Against) -> tuple[Any, Any]:
    """(mean x, losses by point and seed) where all seeds have the point."""
    points = min(len(row.curve) for row in rows)
    x = np.array([[getattr(row.curve[i], against) for row in rows] for i in range(points)], dtype=float)
    y = np.array([[row.curve[i].loss for row in rows] for i in range(points)], dtype=float)
    return x.mean(axis=1) if points else x, y
