"""Compared runs on tasks: each is fine-tuned where it has ended, and methods are held against each other by task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsae.config import Config
from sparsae.core.intervals import mean_interval
from sparsae.data import Progress
from sparsae.experiments.compare.record import Results, Row
from sparsae.files import read_json
from sparsae.report import markup
from sparsae.report.readable import UNKNOWN
from sparsae.report.tables import Table
from sparsae.tasks.data import TaskData
from sparsae.tasks.settings import FinetuneConfig
from sparsae.tasks.study import finetune_run
from sparsae.tasks.tables import remarks, share

TaskRow = Mapping[str, Any]
_KEPT = (
    "task", "title", "topology", "scores", "majority", "train_examples", "available_examples", "validation_examples",
    "held_out", "shortened", "rule", "swaps",
)  # fmt: skip
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


def task_rows(run: Path) -> tuple[TaskRow, ...]:
    """What is kept of a run's fine-tunings in the row of the run; none where they have not ended."""
    file = run / "tasks" / "results.json"
    if not file.is_file():
        return ()
    return tuple({key: row[key] for key in _KEPT} for row in read_json(file)["rows"])


def summarize_tasks(rows: Sequence[Row]) -> tuple[TaskRow, ...]:
    """Each method at each sparsity with each topology: the mean score on each task, over runs, and of them all."""
    groups: dict[tuple[str, float, str], list[list[TaskRow]]] = {}
    for row in rows:
        for mode in dict.fromkeys(each["topology"] for each in row.tasks or ()):
            mine = [each for each in row.tasks or () if each["topology"] == mode]
            groups.setdefault((row.method, row.sparsity, mode), []).append(mine)
    found = []
    for (method, sparsity, mode), runs in groups.items():
        scores = [{each["task"]: each["scores"]["score"]["mean"] for each in run} for run in runs]
        tasks = {task: asdict(mean_interval([run[task] for run in scores])) for task in scores[0]}
        mean = asdict(mean_interval([sum(run.values()) / len(run) for run in scores]))
        found.append({"method": method, "sparsity": sparsity, "topology": mode, "tasks": tasks, "mean": mean})
    return tuple(found)


def tasks_table(results: Results) -> Table:
    """A row for each method, sparsity and topology, a column for each task, the majority class's last."""
    first = {each["task"]: each for row in results.rows for each in row.tasks or ()}
    columns = ["method", "sparsity", "topology", *(each["title"] for each in first.values()), "mean"]
    rows = [
        [
            entry["method"],
            f"{entry['sparsity']:g}",
            entry["topology"],
            *(share(entry["tasks"][task]) if task in entry["tasks"] else UNKNOWN for task in first),
            share(entry["mean"]),
        ]
        for entry in results.tasks or ()
    ]
    guesses = [each["majority"]["score"] for each in first.values()]
    cells = [f"{100 * guess:.1f}" for guess in [*guesses, sum(guesses) / len(guesses)]]
    return Table("Scores on tasks", columns, [*rows, ["majority class", "", "", *cells]], names=3)


def tasks_section(results: Results) -> str:
    """The part of the page; empty where there were no tasks."""
    if not results.tasks:
        return ""
    table = tasks_table(results)
    cells = [[" · ".join(filter(None, row[:3])), *row[3:]] for row in table.rows]
    told = list(dict.fromkeys(remark for row in _distinct(results) for remark in remarks({"rows": [row]})))
    return markup.section(
        "tasks",
        "Tasks",
        _READ,
        markup.table(table.title, [" · ".join(table.columns[:3]), *table.columns[3:]], cells),
        markup.notes(told),
    )


def _distinct(results: Results) -> Iterator[TaskRow]:
    """One row of each task: what is to be said of its data is said once."""
    yield from {each["task"]: {**each, "rule": None} for row in results.rows for each in row.tasks or ()}.values()
