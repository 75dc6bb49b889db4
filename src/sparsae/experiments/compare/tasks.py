"""Compared runs on tasks: each is fine-tuned where it has ended, and methods are held against each other by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sparsae.config import Config
from sparsae.core.intervals import mean_interval
from sparsae.core.record import field_names
from sparsae.data import Progress
from sparsae.experiments.compare.record import Results, Row
from sparsae.report import markup
from sparsae.report.readable import UNKNOWN
from sparsae.report.tables import Table
from sparsae.tasks.data import TaskData
from sparsae.tasks.record import MethodScores, TaskScores
from sparsae.tasks.settings import FinetuneConfig, TopologyMode
from sparsae.tasks.study import finetune_run, read_results
from sparsae.tasks.tables import remarks, share

_READ = (
    "In percent: the mean over runs of one method, each run's score being the mean over its fine-tunings, with half of "
    "the 95 % interval over runs where there are several."
)


def fine_tune(
    run: Path, config: Config, settings: FinetuneConfig, data: Sequence[TaskData], progress: Progress
) -> None:
    """Bring the fine-tunings of one compared run to their ends; a dense one has no topology to keep or search."""
    if config.sparsity.sparsity == 0:
        settings = settings.model_copy(update={"topology": ["dense"]})
    finetune_run(run, settings, progress=progress, data=data)


def task_rows(run: Path) -> tuple[TaskScores, ...]:
    """What is kept of a run's fine-tunings in the row of the run; none where they have not ended."""
    found = read_results(run)
    kept = field_names(TaskScores)
    return tuple(TaskScores(**{name: getattr(row, name) for name in kept}) for row in found.rows) if found else ()


def summarize_tasks(rows: Sequence[Row]) -> tuple[MethodScores, ...]:
    """Each method at each sparsity with each topology: the mean score on each task, over runs, and of them all."""
    groups: dict[tuple[str, float, TopologyMode], list[list[TaskScores]]] = {}
    for row in rows:
        for mode in dict.fromkeys(each.topology for each in row.tasks or ()):
            mine = [each for each in row.tasks or () if each.topology == mode]
            groups.setdefault((row.method, row.sparsity, mode), []).append(mine)
    found = []
    for (method, sparsity, mode), runs in groups.items():
        scores = [{each.task: each.scores["score"].mean for each in run} for run in runs]
        tasks = {task: mean_interval([run[task] for run in scores]) for task in scores[0]}
        mean = mean_interval([sum(run.values()) / len(run) for run in scores])
        found.append(MethodScores(method=method, sparsity=sparsity, topology=mode, tasks=tasks, mean=mean))
    return tuple(found)


def tasks_table(results: Results) -> Table:
    """A row for each method, sparsity and topology, a column for each task, the majority class's last."""
    first = {each.task: each for row in results.rows for each in row.tasks or ()}
    columns = ["method", "sparsity", "topology", *(each.title for each in first.values()), "mean"]
    rows = [
        [
            entry.method,
            f"{entry.sparsity:g}",
            entry.topology,
            *(share(entry.tasks[task]) if task in entry.tasks else UNKNOWN for task in first),
            share(entry.mean),
        ]
        for entry in results.tasks or ()
    ]
    guesses = [each.majority["score"] for each in first.values()]
    cells = [f"{100 * guess:.1f}" for guess in [*guesses, sum(guesses) / len(guesses)]]
    return Table("Scores on tasks", columns, [*rows, ["majority class", "", "", *cells]], names=3)


def tasks_section(results: Results) -> str:
    """The part of the page; empty where there were no tasks."""
    if not results.tasks:
        return ""
    table = tasks_table(results)
    cells = [[" · ".join(filter(None, row[:3])), *row[3:]] for row in table.rows]
    told = list(dict.fromkeys(remark for row in _distinct(results) for remark in remarks([row])))
    return markup.section(
        "tasks",
        "Tasks",
        _READ,
        markup.table(table.title, [" · ".join(table.columns[:3]), *table.columns[3:]], cells),
        markup.notes(told),
    )


def _distinct(results: Results) -> Iterator[TaskScores]:
    """One row of each task: what is to be said of its data is said once."""
    yield from {each.task: replace(each, rule=None) for row in results.rows for each in row.tasks or ()}.values()
