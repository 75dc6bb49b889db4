"""Fine-tuning of a run on tasks: every task, topology and seed, one after the other, and what they say together.

    DIR/ended/TASK-TOPOLOGY-SEED-DIGEST.json   one for each fine-tuning that ended
    DIR/results.json  table.md  report.html

A fine-tuning that ended is not done again: its file names what it was made with, and serves as long as that is equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sparsae.core.intervals import mean_interval
from sparsae.core.record import decode, encode
from sparsae.data import Progress
from sparsae.errors import InputError
from sparsae.files import read_sealed, write_atomically, write_sealed
from sparsae.runs.directory import RunDirectory
from sparsae.runs.lock import locked
from sparsae.tasks.catalogue import task_named
from sparsae.tasks.data import TaskData, read_task
from sparsae.tasks.metrics import majority
from sparsae.tasks.record import MeanScore, Outcome, Score, TaskResults, TaskRow
from sparsae.tasks.settings import FinetuneConfig, TopologyMode

_RESULTS = "results.json"
_FORMAT = 2  # of what is written; another one does everything again


@dataclass(frozen=True)
class Job:
    """One fine-tuning: what it is made with, and where its outcome lies."""

    data: TaskData
    mode: TopologyMode
    seed: int
    made_with: Mapping[str, Any]
    file: Path


def read_tasks(settings: FinetuneConfig) -> list[TaskData]:
    """The examples of all tasks. Raises InputError where they cannot be read, scored, or trained on."""
    from sparsae.tasks.finetune import refuse_without_libraries
    from sparsae.train.model import choose_device

    refuse_without_libraries()
    if settings.device is not None:
        choose_device(settings.device, "--device")
    tasks = [read_task(task_named(name), settings.data, settings.max_examples) for name in settings.names]
    for data in tasks:
        majority(data)
    return tasks


def require_length(settings: FinetuneConfig, context: int) -> None:
    """Raise InputError where examples may be longer than what the model reads."""
    if settings.max_length is not None and settings.max_length > context:
        raise InputError(f"max_length {settings.max_length}: the model reads {context} tokens; give at most so many")


def finetune_run(
    path: Path,
    settings: FinetuneConfig,
    out: Path | None = None,
    progress: Progress | None = None,
    data: Sequence[TaskData] | None = None,
    best: bool = False,
) -> TaskResults:
    """Fine-tune the run in `path` as the settings say; writes into `out` (None: RUN/tasks) and returns the results.

    data: what `read_tasks` gives for the settings, where that is at hand. best: begin with the run's best checkpoint,
    not its newest.

    Raises InputError for a run, data or settings that are wrong, before anything is trained. Stopped at any time and
    called again, it goes on after the last fine-tuning that ended.
    """
    from sparsae.tasks.finetune import finetune, step_count

    run = RunDirectory.open(path)
    config = run.config()
    require_length(settings, config.model.context)
    modes = _modes(path, config.sparsity.sparsity > 0, settings)
    identity = _identity(run, best)
    out = path / "tasks" if out is None else out
    tasks = read_tasks(settings) if data is None else data
    baselines = {data.task.name: majority(data) for data in tasks}
    jobs = list(_jobs(tasks, modes, settings, identity, out / "ended"))
    try:
        (out / "ended").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; choose another directory") from None
    with locked(out, "these tasks"):
        left = [job for job in jobs if _ended(job) is None]
        total, done = sum(step_count(settings, len(job.data.train)) for job in left), 0

        def step_done() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress("finetune", done, total)

        for job in left:
            outcome = finetune(path, job.data, job.mode, job.seed, settings, step_done, best)
            write_sealed(job.file, encode(replace(outcome, made_with=job.made_with)))
        rows = _rows(jobs, baselines)
        results = TaskResults(
            run=path.resolve().name,
            method=config.method,
            sparsity=config.sparsity.sparsity,
            **identity,
            settings=settings.model_dump(mode="json"),
            rows=tuple(rows),
            means=tuple(_means(rows)),
        )
        write_sealed(out / _RESULTS, encode(results))
        _write_pages(results, out)
    return results


def read_results(run: Path) -> TaskResults | None:
    """What `finetune_run` wrote into a run's own directory; None where it has not ended.

    Raises InputError for a file that is damaged.
    """
    file = run / "tasks" / _RESULTS
    return decode(TaskResults, read_sealed(file), str(file)) if file.is_file() else None


def _write_pages(results: TaskResults, out: Path) -> None:
    from sparsae.tasks.page import page
    from sparsae.tasks.tables import scores_table

    write_atomically(out / "table.md", scores_table(results).markdown())
    write_atomically(out / "report.html", page(results))


def _modes(path: Path, is_sparse: bool, settings: FinetuneConfig) -> Sequence[TopologyMode]:
    """What is done to the topology. Raises InputError where a dense run is to keep or search one that was asked for."""
    if is_sparse:
        return settings.topology
    if "topology" in settings.model_fields_set and settings.topology != ["dense"]:
        raise InputError(f"{path}: this run is dense and has no topology: leave out --topology")
    return ("dense",)


def _identity(run: RunDirectory, best: bool) -> dict[str, Any]:
    manifest, checkpoint = run.manifest(), run.best_checkpoint() if best else run.latest_checkpoint()
    return {"run_of": manifest.run if manifest else "", "step": int(checkpoint.name.rpartition("-")[2])}


def _jobs(
    tasks: Sequence[TaskData],
    modes: Sequence[TopologyMode],
    settings: FinetuneConfig,
    identity: Mapping[str, Any],
    folder: Path,
) -> Iterator[Job]:
    # By seeds last: what is stopped early has compared something.
    own = settings.model_dump(mode="json", exclude={"names", "data", "topology", "seeds", "max_examples"})
    for seed in settings.seeds:
        for data in tasks:
            for mode in modes:
                named = {"task": data.task.name, "topology": mode, "seed": seed, "examples": data.digest}
                made_with = {"format": _FORMAT, **identity, **named, **own}
                digest = blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=4).hexdigest()
                yield Job(data, mode, seed, made_with, folder / f"{data.task.name}-{mode}-{seed}-{digest}.json")


def _ended(job: Job) -> Outcome | None:
    """The outcome of a fine-tuning that ended. Raises InputError for a file that is damaged."""
    if not job.file.is_file():
        return None
    content = read_sealed(job.file)
    return decode(Outcome, content, str(job.file)) if content.get("made_with") == job.made_with else None


def _rows(jobs: Sequence[Job], baselines: Mapping[str, Mapping[str, float]]) -> list[TaskRow]:
    """A row for each task and topology, over all seeds."""
    groups: dict[tuple[str, TopologyMode], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.data.task.name, job.mode), []).append(job)
    rows = []
    for (name, mode), group in groups.items():
        outcomes = {str(job.seed): outcome for job in group if (outcome := _ended(job)) is not None}
        data, first = group[0].data, next(iter(outcomes.values()))
        values = {metric: {seed: o.scores[metric] for seed, o in outcomes.items()} for metric in first.scores}
        rows.append(
            TaskRow(
                task=name,
                title=data.task.title,
                topology=mode,
                scores={metric: Score(**_summary(each)) for metric, each in values.items()},
                majority=baselines[name],
                epochs={seed: tuple(epoch["score"] for epoch in o.epochs) for seed, o in outcomes.items()},
                train_examples=len(data.train),
                available_examples=data.available,
                validation_examples=sum(map(len, data.validations.values())),
                held_out=data.held_out,
                shortened=first.shortened,
                nnz=first.nnz,
                parameters=first.parameters,
                rule=first.rule,
                swaps=sum(o.swaps for o in outcomes.values()),
                seconds=sum(o.seconds for o in outcomes.values()),
            )
        )
    return rows


def _means(rows: Sequence[TaskRow]) -> Iterator[MeanScore]:
    """Of each topology, the mean over tasks of their scores, seed by seed."""
    for mode in dict.fromkeys(row.topology for row in rows):
        values = [row.scores["score"].values for row in rows if row.topology == mode]
        if len(values) > 1:
            means = {seed: sum(each[seed] for each in values) / len(values) for seed in values[0]}
            yield MeanScore(topology=mode, **_summary(means))


def _summary(values: Mapping[str, float]) -> dict[str, Any]:
    return {**asdict(mean_interval(list(values.values()))), "values": values}
