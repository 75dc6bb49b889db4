"""The scores of fine-tuned tasks as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsae.core.intervals import Interval
from sparsae.report.tables import Table
from sparsae.tasks.metrics import TITLES
from sparsae.tasks.record import Score, TaskResults, TaskScores

MODES = {"frozen": "sparse, topology frozen", "searched": "sparse, topology searched", "dense": "densified"}


def mode_title(results: TaskResults, mode: str) -> str:
    """What a topology mode means for this run: of a dense one, nothing was densified."""
    return "dense" if results.sparsity == 0 else MODES[mode]


def metric_title(name: str) -> str:
    """`accuracy_matched` -> "accuracy, matched"."""
    for metric, title in TITLES.items():
        if name == metric:
            return title
        if name.removeprefix(f"{metric}_") in ("matched", "mismatched"):
            return f"{title}, {name.removeprefix(f'{metric}_')}"
    return name


def scores_table(results: TaskResults) -> Table:
    """A row for each metric of each task and topology, the majority class's below them, means over tasks last."""
    columns = ["task", "metric", "model", "score", "seeds", "trained on", "scored on"]
    rows = list(_rows(results))
    rows += [
        ["mean of tasks", "score", mode_title(results, mean.topology), share(mean), str(mean.n), "", ""]
        for mean in results.means
    ]
    title = f"{results.run}: fine-tuned on tasks, in percent"
    return Table(title, columns, rows, names=3)


def share(score: Score | Interval) -> str:
    """`71.2 ± 0.9`, in percent."""
    if score.high is None:
        return f"{100 * score.mean:.1f}"
    return f"{100 * score.mean:.1f} ± {100 * (score.high - score.mean):.1f}"


def _rows(results: TaskResults) -> Iterator[list[str]]:
    for task in dict.fromkeys(row.task for row in results.rows):
        group = [row for row in results.rows if row.task == task]
        first = group[0]
        trained = f"{first.train_examples:,}"
        scored = f"{first.validation_examples:,}" + (" held out" if first.held_out else "")
        for metric in first.scores:
            if metric == "score":
                continue
            name = [first.title, metric_title(metric)]
            for row in group:
                score = row.scores[metric]
                yield [*name, mode_title(results, row.topology), share(score), str(score.n), trained, scored]
            yield [*name, "majority class", f"{100 * first.majority[metric]:.1f}", "", trained, scored]


def remarks(rows: Sequence[TaskScores]) -> list[str]:
    """What a reader of the table must know."""
    found = []
    tasks = {row.task: row for row in rows}.values()
    if held_out := [row.title for row in tasks if row.held_out]:
        found.append(
            f"{', '.join(held_out)}: the data has no validation split. About a tenth of the training examples was held "
            "out, those whose first text has a digest that ten divides; these scores are of none of the suite's own."
        )
    for row in tasks:
        if row.shortened:
            found.append(f"{row.title}: {row.shortened:,} examples were too long, and lost the end of a text.")
        if row.train_examples < row.available_examples:
            found.append(
                f"{row.title}: {row.train_examples:,} of {row.available_examples:,} training examples, "
                "drawn once for all seeds."
            )
    rules = {row.rule: sum(each.swaps for each in rows) for row in rows if row.rule}
    found += [f"Searched by the rule {rule}: {swaps:,} connections replaced in all." for rule, swaps in rules.items()]
    found.append("Scores are of the last epoch: none was chosen by them. Intervals are of 95 %.")
    return found
