"""The page of several runs: their curves over each other, their numbers side by side, the settings that they differ in.

Losses are held against each other only where the runs were validated and tested on the same sequences: what each run's
checkpoint says of its text, its context and how many sequences it reads has to be the same. Runs of other texts get
figures of their own, and a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsae import __version__
from sparsae.config.held_out import OF_SEQUENCES, held_out
from sparsae.config.text import inline
from sparsae.errors import InputError
from sparsae.report import markup
from sparsae.report.data import RunData, or_nan, read_run
from sparsae.report.looks import Look, keys, looks
from sparsae.report.readable import UNKNOWN, compact, count, decimal, duration, in_bytes, percent, sparsity_text
from sparsae.report.svg import COLOURS, Panel, axes, curve, numbered, panel
from sparsae.runs.directory import RunDirectory
from sparsae.runs.rows import TopologyRow, TrainRow, perplexity

_MOST = 26  # letters for their texts; looks come round again after 32
Points = tuple[list[float], list[float]]


def read_runs(paths: Sequence[Path]) -> dict[str, RunData]:
    """The runs in these directories, by what tells the directories apart.

    Raises InputError for a directory that is given twice, or holds no run that can be reported.
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{path}: given twice: name each run once")
    if len(paths) > _MOST:
        raise InputError(f"{len(paths)} runs are more than one page can tell apart: name at most {_MOST}")
    return dict(zip(_names(places), map(read_run, paths), strict=True))


def title(runs: Mapping[str, RunData]) -> str:
    """The page's heading."""
    return f"{len(runs)} runs"


def body(runs: Mapping[str, RunData]) -> str:
    """Everything inside the page's body."""
    look, groups = looks(list(runs)), comparable(runs)
    legend = f'<p class="lead">{escape(", ".join(runs))}</p>'
    return "\n".join(
        [
            f"<header>\n<h1>{escape(title(runs))}</h1>\n{legend}\n</header>\n<main>",
            markup.notes(_remarks(runs, groups)),
            markup.section(
                "numbers",
                "Side by side",
                "As far as each run has come.",
                _numbers(runs, groups),
            ),
            markup.section(
                "training",
                "Training",
                "Lower is better. By FLOPs, runs of different sparsity can be held against each other.",
                markup.figures([*_losses(groups, look), *_of_training(runs, look)]),
            ),
            markup.section(
                "movement",
                "Movement of the topology",
                "How far the topologies moved, where they did.",
                markup.figures(_of_updates(runs, look)) or markup.paragraph("No connection moved."),
            ),
            markup.section(
                "settings", "Settings that differ", "All others are the same in every run.", _differences(runs)
            ),
            f"</main>\n<footer>Written by sparsae {escape(__version__)} from the runs' own metrics.</footer>",
        ]
    )


def comparable(runs: Mapping[str, RunData]) -> list[dict[str, RunData]]:
    """The runs in groups whose losses can be compared; a run of which that is not known is a group of its own."""
    groups: dict[object, dict[str, RunData]] = {}
    for name, run in runs.items():
        read = _held_out(run)
        groups.setdefault(name if read is None else read, {})[name] = run
    return list(groups.values())


def _held_out(run: RunData) -> tuple[object, ...] | None:
    """What its validation and test read: text and tokenizer (by their digest), and which sequences; None: not known."""
    state = RunDirectory(run.path).newest_state()
    return None if state is None else (state["corpus"], *held_out(run.config, OF_SEQUENCES).values())


def _is_known(group: Mapping[str, RunData]) -> bool:
    """Whether it is known what validation and test of a group read."""
    return all(_held_out(run) is not None for run in group.values())


def _remarks(runs: Mapping[str, RunData], groups: Sequence[Mapping[str, RunData]]) -> list[str]:
    """What a reader must know before comparing."""
    remarks = []
    for group in groups[1:]:
        why = (
            "validation or test read another text or tokenizer, or other sequences"
            if _is_known(groups[0]) and _is_known(group)
            else "no checkpoint tells what validation read"
        )
        whose = f"those of {', '.join(group)} with those of {next(iter(groups[0]))}"
        remarks.append(f"Losses cannot be compared, {whose}: {why}.")
    for name, run in runs.items():
        if run.totals is None:
            remarks.append(f"{name} has no summary: it is going on or was cut off, at step {count(run.last_step)}.")
        elif run.totals.diverged:
            remarks.append(f"{name} diverged after step {count(run.totals.diverged.step)}.")
        elif not run.totals.finished:
            remarks.append(f"{name} was stopped at step {count(run.totals.steps)}.")
    return remarks


def _numbers(runs: Mapping[str, RunData], groups: Sequence[Mapping[str, RunData]]) -> str:
    text = {name: _text_of(groups, number) for number, group in enumerate(groups) for name in group}
    entries: dict[str, Callable[[str, RunData], str]] = {
        "method": lambda _, run: run.config.method,
        "preset": lambda _, run: run.config.preset,
        "sparsity": lambda _, run: sparsity_text(run.config.sparsity.sparsity),
        "seed": lambda _, run: str(run.config.seed),
        "steps": lambda _, run: f"{count(run.steps)} of {count(run.config.training.steps)}",
        "tokens": lambda _, run: compact(run.reached.tokens) if run.reached else UNKNOWN,
        "validation perplexity": lambda _, run: (
            decimal(perplexity(run.validation[-1].loss)) if run.validation else UNKNOWN
        ),
        "validation loss": lambda _, run: f"{run.validation[-1].loss:.4f}" if run.validation else UNKNOWN,
        "test loss": lambda _, run: _total(run, lambda t: or_nan(t.test_loss), lambda v: f"{v:.4f}"),
        "parameters": lambda _, run: _total(run, lambda t: t.parameters, count),
        "active connections": lambda _, run: count(run.reached.nnz) if run.reached and run.layers else UNKNOWN,
        "training FLOPs": lambda _, run: compact(run.reached.train_flops) if run.reached else UNKNOWN,
        "share of dense FLOPs": lambda _, run: _total(
            run, lambda t: t.train_flops / (t.train_flops_dense_equivalent or math.nan), lambda v: f"{v:.3f}"
        ),
        "state of sparse layers, at most": lambda _, run: _total(
            run, lambda t: t.state_bytes_sparse_layers or math.nan, in_bytes
        ),
        "peak memory": lambda _, run: _total(run, lambda t: t.peak_memory_bytes, in_bytes),
        "tokens per second": lambda _, run: _total(run, lambda t: or_nan(t.tokens_per_second), count),
        "FLOP per second": lambda _, run: _total(run, lambda t: or_nan(t.flops_per_second), compact),
        "of the peak (MFU)": lambda _, run: _total(run, lambda t: or_nan(t.mfu), percent),
        "time": lambda _, run: _total(run, lambda t: t.seconds, duration),
        "topology updates": lambda _, run: count(len(run.updates)),
    }
    if len(groups) > 1:
        entries = {"held-out text": lambda name, _: text[name], **entries}
    rows = [[label, *(value(name, run) for name, run in runs.items())] for label, value in entries.items()]
    return markup.table(f"{len(runs)} runs", ["what", *runs], rows)


def _total(run: RunData, value: Callable[[Any], float], written: Callable[[float], str]) -> str:
    number = value(run.totals) if run.totals else math.nan
    return written(number) if math.isfinite(number) else UNKNOWN


def _differences(runs: Mapping[str, RunData]) -> str:
    """A row for each setting that is not the same everywhere."""
    settings = {name: _flat(run.config.model_dump(mode="json")) for name, run in runs.items()}
    every = dict.fromkeys(key for found in settings.values() for key in found)
    rows = []
    for key in every:
        values = [found.get(key, UNKNOWN) for found in settings.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return markup.paragraph("The runs have the same settings.")
    return markup.table(f"{len(rows)} settings", ["setting", *runs], rows)


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = inline(value)
    return flat


def _losses(groups: Sequence[Mapping[str, RunData]], look: Mapping[str, Look]) -> list[Panel | None]:
    units = {"step": "steps", "train_flops": "training FLOPs", "seconds": "seconds"}

    def drawn(number: int, against: str) -> Panel | None:
        lines = {
            name: ([float(getattr(row, against)) for row in run.validation], [row.loss for row in run.validation])
            for name, run in groups[number].items()
        }
        name, heading = f"loss-{against.replace('_', '-')}", f"Validation loss by {units[against]}"
        if len(groups) > 1:
            name, heading = f"{name}-{number + 1}", f"{heading}, held-out text {_text_of(groups, number)}"
        return _overlay(lines, look, name, heading, "nats per token", units[against], from_second=True)

    return [drawn(number, against) for number in range(len(groups)) for against in units]


def _text_of(groups: Sequence[Mapping[str, RunData]], number: int) -> str:
    """What the held-out text of a group is called: a letter where it is known."""
    before = sum(map(_is_known, groups[:number]))
    return chr(ord("A") + before) if _is_known(groups[number]) else f"unknown ({', '.join(groups[number])})"


def _of_training(runs: Mapping[str, RunData], look: Mapping[str, Look]) -> list[Panel | None]:
    def drawn(name: str, title: str, unit: str, value: Callable[[TrainRow], float]) -> Panel | None:
        lines = {
            key: ([float(row.step) for row in run.train], list(map(value, run.train))) for key, run in runs.items()
        }
        return _overlay(lines, look, name, title, unit, "step")

    return [
        drawn("learning-rate", "Learning rate", "base rate of the optimizer", lambda row: row.learning_rate),
        drawn("throughput", "Throughput", "tokens per second", lambda row: row.tokens_per_second),
    ]


def _of_updates(runs: Mapping[str, RunData], look: Mapping[str, Look]) -> list[Panel | None]:
    def drawn(name: str, title: str, unit: str, value: Callable[[TopologyRow], float]) -> Panel | None:
        lines = {
            key: ([float(row.step) for row in run.topologies], list(map(value, run.topologies)))
            for key, run in runs.items()
            if run.updates
        }
        return _overlay(lines, look, name, title, unit, "step", shares=True)

    return [
        drawn(
            "hamming", "Distance to the first topology", "share of active connections", lambda row: row.hamming_start
        ),
        drawn("itop", "Positions ever active", "share of all positions", lambda row: row.itop_rate),
    ]


def _overlay(
    lines: Mapping[str, Points],
    look: Mapping[str, Look],
    name: str,
    title: str,
    unit: str,
    x: str,
    from_second: bool = False,
    shares: bool = False,
) -> Panel | None:
    """Lines of several runs, of two points or more each; None where there is none.

    from_second: the scale leaves out what comes before a line's second point. shares: of one.
    """
    lines = {key: (xs, ys) for key, (xs, ys) in lines.items() if sum(map(math.isfinite, ys)) > 1}
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        ax = axes(figure, unit, x=x, left=0.58)
        for key, (xs, ys) in lines.items():
            style = look[key]
            # A mark at the end tells lines apart where colours do not.
            curve(ax, xs, ys, style.colour, linestyle=style.dash, linewidth=1.2, marker=None)
            ax.plot(xs[-1:], ys[-1:], color=COLOURS[style.colour], marker=style.marker, markersize=4)
        ax.set_xlim(left=0)
        if shares:
            numbered(ax.yaxis, percent=True)
        later = [v for _, ys in lines.values() for v in ys[1:] if math.isfinite(v)]
        if from_second and later and max(later) > min(later):
            margin = 0.04 * (max(later) - min(later))
            ax.set_ylim(min(later) - margin, max(later) + margin)

    ends = "; ".join(f"{key} ends at {compact(ys[-1])}" for key, (_, ys) in lines.items())
    return panel(name, title, f"{title}: {ends}.", draw, keys(look, list(lines)), height=3.0)


def _names(places: Sequence[Path]) -> list[str]:
    """The directories' names, with as many of those above as it takes to tell them apart."""
    longest = max(len(place.parts) for place in places)
    for levels in range(1, longest + 1):
        names = ["/".join(place.parts[-levels:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]
