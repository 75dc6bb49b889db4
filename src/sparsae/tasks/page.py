"""The page of fine-tuned tasks: every seed's score beside the majority class's, and the way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsae.report.markup import facts, figures, notes, section, table
from sparsae.report.page import document
from sparsae.report.readable import duration
from sparsae.report.svg import COLOURS, Key, Panel, axes, curve, panel
from sparsae.tasks.record import TaskResults, TaskRow
from sparsae.tasks.settings import FinetuneConfig
from sparsae.tasks.tables import mode_title, remarks, scores_table, share

_MARKS = {"frozen": ("series0", "o", "●"), "searched": ("series2", "^", "▲"), "dense": ("series1", "s", "■")}


def page(results: TaskResults) -> str:
    """The whole page as HTML."""
    settings, rows = FinetuneConfig.model_validate(results.settings), results.rows
    title = f"{results.run} on tasks"
    told = [
        ("method", results.method),
        ("sparsity", f"{results.sparsity:g}"),
        ("step", f"{results.step:,}"),
        ("epochs", str(settings.epochs)),
        ("learning rate", f"{settings.learning_rate:g}"),
        ("batch", str(settings.batch_size)),
        *([("precision", settings.precision)] if settings.precision else []),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("time", duration(sum(row.seconds for row in rows))),
    ]
    scores = scores_table(results)
    cells = [[" · ".join(row[:3]), *row[3:]] for row in scores.rows]
    body = [
        f"<header><h1>{escape(title)}</h1><p>Fine-tuned on each task, with a new head on the last token.</p>"
        f"{facts(told)}</header>",
        section(
            "scores",
            "Scores",
            "Each mark is a seed, the line through them the 95 % interval of their mean; dashed: the majority class.",
            figures(_scores(results)),
            table(scores.title, [" · ".join(scores.columns[:3]), *scores.columns[3:]], cells),
            notes(remarks(rows)),
        ),
    ]
    if settings.epochs > 1:
        lead = "The score after each epoch, mean over seeds. The last one is what counts."
        body.append(section("epochs", "On the way", lead, figures(_ways(results))))
    return document(title, "\n".join(body))


def _groups(results: TaskResults) -> Iterator[tuple[str, Sequence[TaskRow]]]:
    for task in dict.fromkeys(row.task for row in results.rows):
        yield task, [row for row in results.rows if row.task == task]


def _keys(results: TaskResults, group: Sequence[TaskRow]) -> list[Key]:
    marks = {row.topology: _MARKS[row.topology] for row in group}
    return [Key(mode_title(results, mode), colour, symbol) for mode, (colour, _, symbol) in marks.items()]


def _scores(results: TaskResults) -> Iterator[Panel]:
    for task, group in _groups(results):

        def draw(figure: Figure, group: Sequence[TaskRow] = group) -> None:
            ax = axes(figure, "", x="score, %", left=0.12)
            for place, row in enumerate(reversed(group)):
                colour, mark, _ = _MARKS[row.topology]
                score = row.scores["score"]
                values = [100 * value for value in score.values.values()]
                if score.low is not None and score.high is not None:
                    ends = [100 * score.low, 100 * score.high]
                    ax.plot(ends, [place, place], color=COLOURS[colour], alpha=0.5)
                ax.plot(values, [place] * len(values), mark, color=COLOURS[colour], markersize=5)
            ax.axvline(100 * group[0].majority["score"], color=COLOURS["muted"], linestyle="--", linewidth=1)
            ax.set_yticks([])
            ax.set_ylim(-0.7, len(group) - 0.3)
            ax.grid(axis="x")

        told = "; ".join(f"{mode_title(results, row.topology)} {share(row.scores['score'])}" for row in group)
        told += f"; majority class {100 * group[0].majority['score']:.1f}"
        keys = [*_keys(results, group), Key("majority class", "muted", "dash")]
        yield panel(f"score-{task}", group[0].title, f"Scores in percent: {told}.", draw, keys, height=1.7)


def _ways(results: TaskResults) -> Iterator[Panel]:
    for task, group in _groups(results):

        def draw(figure: Figure, group: Sequence[TaskRow] = group) -> None:
            ax = axes(figure, "score, %", x="epoch")
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            for row in group:
                seeds = list(row.epochs.values())
                means = [100 * sum(each) / len(each) for each in zip(*seeds, strict=True)]
                curve(ax, range(1, len(means) + 1), means, _MARKS[row.topology][0])

        keys = [Key(key.label, key.colour) for key in _keys(results, group)]
        yield panel(f"way-{task}", group[0].title, "The mean score after each epoch.", draw, keys, height=2.0)
