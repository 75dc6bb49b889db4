"""A run on tasks of lm-evaluation-harness (Gao et al., 2021): the model as it is, asked for likelihoods."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsae.config.complaints import nearest, shown
from sparsae.errors import InputError
from sparsae.files import expanded
from sparsae.report.tables import Table
from sparsae.tasks.record import Answered, HarnessScores, Metric

EXTRA = "pip install 'sparsae[lm-eval]'"
_SEED, _BATCH = 0, 16


def ask(
    path: Path,
    tasks: Sequence[str],
    *,
    teacher: bool = False,
    best: bool = False,
    include: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> HarnessScores:
    """The scores of the model that `load_run` gives on tasks and groups of tasks, by name or glob, by lm-eval.

    include: folders with task files of one's own, whose names win. num_fewshot: solved examples before each question
    (None: as each task has it; a task that has none keeps none). limit: questions of each task at most.

    Raises InputError without lm-eval, for a run or a folder that cannot be read, an unknown task, and for data of a
    task that cannot be had.
    """
    for folder in include:
        if not Path(expanded(folder)).is_dir():
            raise InputError(f"--include-path: {folder}: no such directory; give one with task files of lm-eval")
    if device is not None:
        from sparsae.train.model import choose_device

        choose_device(device, "--device")
    with _quietly(quiet):
        evaluator, tasks_of, model_of = _library()
        manager, names = _known(tasks, [expanded(folder) for folder in include], tasks_of)
        lm = model_of(path, teacher=teacher, best=best, batch_size=batch_size or _BATCH, device=device)
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), _SEED)
        with _data_errors(tasks):
            found = evaluator.simple_evaluate(
                model=lm,
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
                **seeds,
            )
    return HarnessScores(
        step=lm.step,
        teacher=teacher,
        tasks={name: _scores(name, values, found) for name, values in _all_results(found, names)},
        lm_eval=_version(),
        limit=limit,
    )


def results_table(title: str, found: HarnessScores) -> Table:
    """A row for each metric of each task."""
    rows = []
    for name, task in found.tasks.items():
        for metric, score in task.metrics.items():
            value = _number(score.value) + ("" if score.stderr is None else f" ± {_number(score.stderr)}")
            rows.append(
                [name, metric, value, f"{task.questions:,}", "-" if task.fewshot is None else str(task.fewshot)]
            )
    return Table(title, ["task", "metric", "score ± standard error", "questions", "few-shot"], rows)


def _number(value: float) -> str:
    """A share with four digits; a perplexity that nobody reads to its end as a power of ten."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _library() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(f"--tasks needs lm-evaluation-harness: {EXTRA}") from None
    from sparsae.tasks.lm_eval import SparsaeLM

    return evaluator, TaskManager, SparsaeLM


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _known(tasks: Sequence[str], folders: Sequence[str], tasks_of: Any) -> tuple[Any, list[str]]:
    """What finds tasks, and their names, globs put in full. Raises InputError for what is no task's."""
    if folders:  # lm-eval's own thousands of files take seconds to look through
        manager = tasks_of(include_path=folders, include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager, _in_order(tasks, manager)
    manager = tasks_of(include_path=folders or None)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise InputError(f"--tasks: lm-eval knows no task {shown(name)}; {_near(name, manager.all_tasks)}")
    return manager, _in_order(tasks, manager)


def _in_order(tasks: Sequence[str], manager: Any) -> list[str]:
    """The names that are meant, as they were asked for; those of a glob by the alphabet."""
    return list(dict.fromkeys(name for asked in tasks for name in manager.match_tasks([asked])))


def _near(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("did") else "give one of `lm-eval ls tasks`, or --include-path DIR with your own"


@contextlib.contextmanager
def _data_errors(tasks: Sequence[str]) -> Iterator[None]:
    """Data that is not there, or cannot be fetched, is one line; anything else is a fault and stays one."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--tasks: the data of {', '.join(tasks)} cannot be had ({first}); without a network, give task files "
            "that read local data: --include-path DIR"
        ) from None


@contextlib.contextmanager
def _quietly(quiet: bool) -> Iterator[None]:
    """Libraries log each step of theirs, which is not shown; of a quiet command, neither are their bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if quiet:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.disable(before)


def _all_results(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """In the order in which they were asked for; then the tasks of groups, whose scores are over theirs."""
    results = {**found["results"], **found.get("groups", {})}
    yield from ((name, results[name]) for name in dict.fromkeys([*names, *results]) if name in results)


def _scores(name: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> Answered:
    metrics = {}
    for key, value in values.items():
        metric, _, variant = key.partition(",")
        if not variant or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{variant}")
        told = metric if variant == "none" else f"{metric}, {variant}"
        metrics[told] = Metric(value=float(value), stderr=float(error) if isinstance(error, int | float) else None)
    samples = found["n-samples"]
    members = _members(name, found.get("group_subtasks", {}))
    questions = sum(samples[task]["effective"] for task in members if task in samples)
    return Answered(metrics=metrics, questions=questions, fewshot=found["n-shot"].get(name))


def _members(name: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group, of its groups too; of a task itself."""
    inner = groups.get(name)
    return {name} if not inner else set().union(*(_members(each, groups) for each in inner))
