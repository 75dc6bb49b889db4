"""Curves and bars: each function takes a run and gives one figure, or None where the run has nothing to draw in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsae.registry import TERMS
from sparsae.report.data import RunData, or_nan
from sparsae.report.readable import compact, decimal
from sparsae.report.svg import COLOURS, Key, Panel, axes, curve, logarithmic, numbered, panel
from sparsae.runs.rows import TopologyRow, TrainRow
from sparsae.search.rows import CandidateRow

_MARKERS = (("o", "○"), ("^", "△"), ("s", "□"), ("D", "◇"), ("v", "▽"), ("p", "⬠"))
_SHOWN_UPDATES = 200
_SHOWN_CANDIDATES = 500
_SHOWN_SPANS = 150
_TRIVIAL = {"at the start": "at the start", "unigram": "of frequencies alone (unigram)"}
_PART_NAMES = {"dense_gradients": "growth gradients"}


def loss(run: RunData, against: Literal["step", "train_flops"]) -> Panel | None:
    """Cross entropy of training and validation, the teacher's too, between the losses of trivial models."""
    curves = {
        Key("training", "muted"): ([getattr(r, against) for r in run.train], [r.cross_entropy for r in run.train]),
        Key("validation", "accent"): (
            [getattr(r, against) for r in run.validation],
            [r.loss for r in run.validation],
        ),
        Key("validation of the teacher", "warm", "dash"): (
            [getattr(r, against) for r in run.validation],
            [or_nan(r.teacher_loss) for r in run.validation],
        ),
    }
    curves = {key: (x, y) for key, (x, y) in curves.items() if _any(x) and _any(y)}
    lines = {"at the start": run.untrained_loss, "unigram": run.unigram_loss}
    lines = {name: value for name, value in lines.items() if math.isfinite(value)}
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        ax = axes(figure, "nats per token", x="training FLOPs" if against == "train_flops" else "step")
        for key, (x, y) in curves.items():
            width = 1.0 if key.colour == "muted" else 1.5
            curve(ax, x, y, key.colour, linestyle="--" if key.mark == "dash" else "-", linewidth=width)
        ax.set_xlim(0, max(v for x, _ in curves.values() for v in x if math.isfinite(v)) or 1)
        for name, value in lines.items():
            ax.axhline(value, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
            at = _free_end(value, [y for _, y in curves.values()])
            ax.annotate(
                f"{name} {decimal(value, 3)}",
                (at, value),
                (0 if at else 4, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right" if at else "left",
                va="bottom",
                color=COLOURS["ink"],
            )

    described = [f"{key.label} from {_ends(y)}" for key, (_, y) in curves.items()]
    described += [f"a model {_TRIVIAL[name]} {decimal(value, 3)}" for name, value in lines.items()]
    unit = "training FLOPs" if against == "train_flops" else "steps"
    return panel(
        f"loss-{against.replace('_', '-')}",
        f"Cross entropy by {unit}",
        f"Cross entropy in nats per token against {unit}: {'; '.join(described)}.",
        draw,
        list(curves),
        height=3.0,
    )


def training_curve(
    run: RunData, name: str, title: str, unit: str, value: Callable[[TrainRow], float], *, log: bool = False
) -> Panel | None:
    """A quantity of the training rows, burn-in periods shaded."""
    x, y = [row.step for row in run.train], [value(row) for row in run.train]
    if not _any(y):
        return None
    spans = run.burn_in_spans()
    every = max(1, -(-len(spans) // _SHOWN_SPANS))
    positive = log and all(v > 0 for v in y if math.isfinite(v))

    def draw(figure: Figure) -> None:
        ax = axes(figure, unit)
        curve(ax, x, y, "accent", linewidth=1.2)
        if positive and max(v for v in y if v > 0) > 30 * min(v for v in y if v > 0):
            ax.set_yscale("log")
            logarithmic(ax.yaxis)
        elif min(v for v in y if math.isfinite(v)) >= 0:
            _from_zero(ax, y)
        ax.set_xlim(0, max(run.last_step, 1))
        if spans:
            ax.broken_barh(
                [(a, b - a) for a, b in spans[::every]],
                (0, 1),
                transform=ax.get_xaxis_transform(),
                facecolor=COLOURS["warm"],
                alpha=0.25,
                linewidth=0,
            )

    label = "burn-in" if every == 1 else f"burn-in, 1 in {every} shown"
    keys = [Key(label, "warm", "band")] if spans else []
    shaded = f" Burn-in is shaded ({len(spans)} periods)." if len(spans) > 1 else " Burn-in is shaded." if spans else ""
    return panel(name, title, f"{title} against steps: from {_ends(y)}.{shaded}", draw, keys)


def scores(run: RunData) -> Panel | None:
    """Every candidate's score less the current topology's, by update; below zero is better."""
    scored = [u for u in run.updates if u.current is not None and any(c.is_scored for c in u.candidates)]
    if not scored:
        return None
    shown = scored[:: -(-sum(len(u.candidates) for u in scored) // _SHOWN_CANDIDATES)]
    proposers = list(dict.fromkeys(c.proposer for u in run.updates for c in u.candidates))
    threshold = _linear_up_to(
        [d for p in proposers for taken in (False, True) for _, d in _differences(shown, p, taken)]
    )
    marker = {proposer: _MARKERS[i % len(_MARKERS)] for i, proposer in enumerate(proposers)}

    def draw(figure: Figure) -> None:
        scale = f", logarithmic beyond ±{compact(threshold)}" if threshold else ""
        ax = axes(figure, f"score less the current topology's{scale}", left=0.58)
        for proposer in proposers:
            for taken in (False, True):
                points = _differences(shown, proposer, taken)
                face = COLOURS["accent"] if taken else "none"
                edge = COLOURS["accent"] if taken else COLOURS["muted"]
                ax.plot(
                    *zip(*points, strict=True) if points else ((), ()),
                    linestyle="none",
                    marker=marker[proposer][0],
                    markersize=4.5 if taken else 3.5,
                    markerfacecolor=face,
                    markeredgecolor=edge,
                    markeredgewidth=0.8,
                    zorder=3 if taken else 2,
                )
        ax.axhline(0, color=COLOURS["ink"], linewidth=0.8)
        outside = [u.step for u in shown for c in u.candidates if c.rejected is not None]
        ax.plot(
            outside,
            [0.02] * len(outside),
            linestyle="none",
            marker="x",
            color=COLOURS["warm"],
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )
        ax.set_xlim(0, max(run.last_step, 1))
        ax.margins(y=0.12)
        if threshold:
            ax.set_yscale("symlog", linthresh=threshold)
            numbered(ax.yaxis, linear=False)

    keys = [Key("accepted", "accent", "●"), Key("not taken", "muted", "○")]
    if any(c.rejected is not None for u in shown for c in u.candidates):
        keys.append(Key("outside its bounds", "warm", "×"))
    if len(proposers) > 1:
        keys += [Key(proposer, "ink", marker[proposer][1]) for proposer in proposers]
    accepted = sum(u.accepted for u in run.updates)
    better = sum(u.best.score < u.current.score for u in scored if u.best and u.current)
    thinned = f", {len(shown)} of them shown" if len(shown) < len(scored) else ""
    return panel(
        "scores",
        "Candidates against the current topology",
        f"Score of each candidate less that of the current topology, for {len(scored)} updates{thinned}. "
        f"In {better} of them the best candidate scored below the current topology; {accepted} of {len(run.updates)} "
        "updates were accepted.",
        draw,
        keys,
    )


def term(run: RunData, name: str) -> Panel | None:
    """One term of the score: the current topology, the best candidate and the range of all candidates."""

    def value(candidate: CandidateRow) -> float:
        return candidate.terms.get(name, math.nan)

    title, unit = _label(name)
    rows = [u for u in run.updates if u.current is not None and u.best is not None]
    steps = [u.step for u in rows]
    current = [value(u.current) for u in rows if u.current]
    best = [value(u.best) for u in rows if u.best]
    if not _any(best):
        return None
    every = [[v for c in u.candidates if math.isfinite(v := value(c))] for u in rows]

    def draw(figure: Figure) -> None:
        ax = axes(figure, unit)
        keep = slice(None, None, -(-len(steps) // _SHOWN_UPDATES))
        low, high = ([pick(v, default=math.nan) for v in every[keep]] for pick in (min, max))
        ax.fill_between(steps[keep], low, high, color=COLOURS["accent"], alpha=0.2, linewidth=0)
        curve(ax, steps, current, "muted", linestyle="--", marker=None, linewidth=1.2)
        curve(ax, steps, best, "accent")
        ax.set_xlim(0, max(run.last_step, 1))

    keys = [Key("best candidate", "accent"), Key("all candidates", "accent", "band"), Key("current", "muted", "dash")]
    text = f"{title} of the best candidate from {_ends(best)}; of the current topology from {_ends(current)}."
    return panel(f"term-{name.replace('_', '-')}", title, text, draw, keys)


def _label(term: str) -> tuple[str, str]:
    """What people call a term, and its unit; its bare name where it is not known here."""
    if term not in TERMS:
        return term, ""
    known = TERMS[term].build(TERMS[term].settings())
    return known.label, known.unit


def by_update(
    run: RunData,
    name: str,
    title: str,
    unit: str,
    lines: Mapping[Key, Callable[[TopologyRow], float]],
    *,
    shape: Literal["line", "steps", "stems"] = "line",
    initial: bool = True,
) -> Panel | None:
    """Quantities that each update records, from zero up: "steps" hold until the next update, "stems" stand alone."""
    rows = run.topologies if initial else run.updates
    values = {key: [value(row) for row in rows] for key, value in lines.items()}
    values = {key: y for key, y in values.items() if _any(y)}
    if not values or not run.updates:
        return None
    x = [row.step for row in rows]
    if shape == "steps":
        x, values = [*x, run.last_step], {key: [*y, y[-1]] for key, y in values.items()}

    def draw(figure: Figure) -> None:
        ax = axes(figure, unit, left=0.58)
        for key, y in values.items():
            style = {"drawstyle": "steps-post", "marker": None} if shape == "steps" else {}
            if shape == "stems":
                ax.vlines(x, 0, y, color=COLOURS[key.colour], linewidth=1.5)
                continue
            curve(ax, x, y, key.colour, linestyle={"dash": "--", "dot": ":"}.get(key.mark, "-"), **style)
        _from_zero(ax, [v for y in values.values() for v in y])
        if unit.startswith("share"):
            numbered(ax.yaxis, percent=True)
        if all(v == round(v) for y in values.values() for v in y if math.isfinite(v)):
            ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlim(0, max(run.last_step, 1))

    text = "; ".join(
        f"{key.label} up to {compact(max(y))}" if shape == "stems" else f"{key.label} from {_ends(y)}"
        for key, y in values.items()
    )
    return panel(name, title, f"{title} ({unit}) by update: {text}.", draw, list(values) if len(values) > 1 else [])


def bars(
    name: str, title: str, parts: Mapping[str, float], totals: Mapping[str, float], written: Callable[[float], str]
) -> Panel | None:
    """Horizontal bars, each with its value: the parts, and below them their total and what it is compared with."""
    rows = [(_PART_NAMES.get(part, part.replace("_", " ")), value, "accent") for part, value in parts.items()]
    rows += [(label, value, "muted") for label, value in totals.items()]
    rows = [(label, value, colour) for label, value, colour in rows if math.isfinite(value)]
    if not rows:
        return None

    def draw(figure: Figure) -> None:
        width = figure.get_figwidth()
        left, right = 0.15 + 0.075 * max(len(label) for label, _, _ in rows), 0.95
        ax = figure.add_axes((left / width, 0.02, (width - left - right) / width, 0.96))
        y = np.arange(len(rows), dtype=float)
        y[len(rows) - len(totals) :] += 0.5 if parts else 0.0
        ax.barh(y, [v for _, v, _ in rows], height=0.62, color=[COLOURS[colour] for *_, colour in rows])
        for at, (_, value, _) in zip(y, rows, strict=True):
            ax.annotate(
                written(value),
                (value, at),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS["ink"],
            )
        ax.set_yticks(y, [label for label, _, _ in rows])
        ax.tick_params(axis="y", labelcolor=COLOURS["ink"])
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.spines["left"].set_visible(True)
        ax.set_ylim(y[-1] + 0.6, -0.6)
        ax.set_xlim(0, max(v for _, v, _ in rows) or 1)

    text = "; ".join(f"{label} {written(value)}" for label, value, _ in rows)
    return panel(name, title, f"{title}: {text}.", draw, height=0.3 + 0.24 * len(rows))


def _differences(updates: Sequence[TopologyRow], proposer: str, taken: bool) -> list[tuple[int, float]]:
    return [
        (u.step, c.score - u.current.score)
        for u in updates
        for i, c in enumerate(u.candidates)
        if u.current is not None and c.proposer == proposer and c.is_scored and (u.accepted and i == u.chosen) == taken
    ]


def _linear_up_to(differences: Sequence[float]) -> float | None:
    """Where a scale must turn logarithmic, lest one large jump press all other candidates onto the zero line."""
    sizes = sorted(abs(d) for d in differences if d)
    middle = sizes[len(sizes) // 2] if sizes else math.inf
    return 10.0 ** round(math.log10(middle)) if sizes and sizes[-1] > 20 * middle else None


def _from_zero(ax: Axes, values: Sequence[float]) -> None:
    ax.set_ylim(0, 1.06 * max(v for v in values if math.isfinite(v)) or 1)


def _any(values: Sequence[float]) -> bool:
    return any(math.isfinite(v) for v in values)


def _free_end(line: float, curves: Sequence[Sequence[float]]) -> Literal[0, 1]:
    """Where a horizontal line is farthest from all curves: at their beginning (0) or at their end (1)."""
    known = [[v for v in values if math.isfinite(v)] for values in curves]
    first, last = (min(abs(values[at] - line) for values in known) for at in (0, -1))
    return 0 if first > last else 1


def _ends(values: Sequence[float]) -> str:
    known = [v for v in values if math.isfinite(v)]
    return f"{compact(known[0])} to {compact(known[-1])}" if known else "nothing"
