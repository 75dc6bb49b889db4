"""What an experiment found, as tidy rows: one a compared run, and the trials of the learning rates beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsae import __version__
from sparsae.config import Config
from sparsae.core.accounting import dense_state_bytes
from sparsae.experiments.compare.equal_loss import equal_loss
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.compare.ranking import rank_agreement, summarize_rankings
from sparsae.experiments.compare.record import CurvePoint, Look, Results, Row, TrialRow, TuningRow
from sparsae.experiments.compare.stuck import stuck_counts
from sparsae.experiments.compare.summary import conclusions, contrasts, judged_by, summarize, warnings
from sparsae.experiments.compare.tables import contrast_table, results_table
from sparsae.experiments.compare.tasks import summarize_tasks, task_rows, tasks_table
from sparsae.experiments.compare.tuning import Found, Point, key_of
from sparsae.experiments.directory import write_all
from sparsae.experiments.jobs import Failure, Job, outcome, stacked
from sparsae.experiments.matching import Budget
from sparsae.report.tables import notes
from sparsae.rules import build_rule
from sparsae.runs.directory import RunDirectory
from sparsae.runs.rows import Row as MetricsRow
from sparsae.runs.rows import TopologyRow, ValidationRow
from sparsae.runs.summary import Summary

# Keys of results.json, at any depth, that a second experiment of the same plan does not repeat.
TIMING = ("seconds", "seconds_by_part", "tokens_per_second", "peak_memory_bytes")
# What is copied from the summary of a run.
_COPIED = (
    "test_loss", "validation_loss", "validation_perplexity", "teacher_validation_loss", "train_flops",
    "train_flops_by_part", "train_flops_dense_equivalent", "tokens", "steps", "parameters", "nnz", "nnz_target",
    "study_flops", "device", "torch",
)  # fmt: skip
_STACKED = (
    "runs trained together, as one batched program that multiplies by dense matrices: it measures their quality, which "
    "is that of runs one by one, and neither their memory nor their time"
)


@dataclass(frozen=True)
class Cell:
    """A compared run."""

    variant: str
    sparsity: float
    seed: int
    budget: Budget
    point: Point
    job: Job


@dataclass(frozen=True)
class Trial:
    """A run that tries a point of tuning."""

    point: Point
    job: Job

    def loss(self, out: Path) -> float:
        """Final validation loss; infinite where the run diverged or is not done."""
        found = outcome(out / self.job.name)
        return found.validation_loss if isinstance(found, Summary) else math.inf


@dataclass(frozen=True)
class Search:
    """The tuning of a variant at a sparsity: what it found, and its trials."""

    variant: str
    sparsity: float
    found: Found
    trials: Sequence[Trial]


def collect(
    plan: ComparisonPlan,
    out: Path,
    cells: Sequence[Cell],
    searches: Sequence[Search],
    trial_share: float,
    complete: bool,
) -> Results:
    """The content of results.json from the runs that are done; trial_share: length of a trial in terms of a run."""
    together = stacked(out)
    rows = tuple(_row(plan, out, cell, together) for cell in cells)
    loss = judged_by(rows)
    results = Results(
        kind=plan.kind,
        complete=complete,
        sparsae=__version__,
        reference=plan.held_against,
        judged_by=loss,
        plan=plan.model_dump(mode="json"),
        rows=rows,
        trial_share=trial_share,
        tuning=tuple(_tuning(out, search, together) for search in searches) if cells else (),
        ranking=summarize_rankings(rows) or None,
        summary=summarize(rows, plan.held_against, loss, plan.planned),
        contrasts=contrasts(rows, loss, plan.planned),
        equal_loss=equal_loss(rows),
        tasks=summarize_tasks(rows) if plan.tasks is not None else None,
        conclusions=conclusions(rows, loss),
        warnings=(),
    )
    settings = {cell.job.name: cell.job.config for cell in cells}
    return replace(results, warnings=(*([_STACKED] if results.is_stacked else []), *warnings(results, settings)))


def write_results(results: Results, out: Path) -> None:
    """results.json, table.md and table.tex, each whole or not at all."""
    tables = [results_table(results), *([contrast_table(results)] if results.contrasts else [])]
    tables += [tasks_table(results)] if results.tasks else []
    write_all(results, tables, out, notes(results.warnings))


def _row(plan: ComparisonPlan, out: Path, cell: Cell, together: set[str]) -> Row:
    run, config = out / cell.job.name, cell.job.config
    found = outcome(run)
    done = found if isinstance(found, Summary) else None
    spent: Any = {"flops": "train_flops", "tokens": "tokens", "steps": "steps"}[cell.budget.match]
    metrics: list[MetricsRow] = RunDirectory(run).read_metrics(ValidationRow, TopologyRow) if done else []
    topologies = [entry for entry in metrics if isinstance(entry, TopologyRow)]
    is_stacked = cell.job.name in together
    return Row(
        method=cell.variant,
        seed=cell.seed,
        sparsity=cell.sparsity,
        match=cell.budget.match,
        budget=cell.budget.amount,
        budget_deviation=getattr(done, spent) / cell.budget.amount - 1.0 if done else None,
        learning_rate=config.training.learning_rate,
        settings=dict(cell.point),
        diverged=done is None,
        **{name: getattr(found, name, None) for name in _COPIED},
        **{name: None if is_stacked else getattr(found, name, None) for name in TIMING},
        stacked=is_stacked,
        **_of_a_finished_run(done, config),
        beside=cell.variant not in plan.named_variants,
        base_method=plan.all_variants[cell.variant].method,
        run=cell.job.name,
        curve=tuple(_point(entry, is_stacked) for entry in metrics if isinstance(entry, ValidationRow)),
        stuck=stuck_counts(topologies),
        tasks=task_rows(run) if plan.tasks is not None else None,
        ranking=rank_agreement(topologies) if done and done.study_flops else None,
    )


def _of_a_finished_run(done: Summary | None, config: Config) -> dict[str, Any]:
    if done is None:
        return {}
    others = done.parameters - done.nnz
    return {
        "state_bytes": done.state_bytes_sparse_layers + dense_state_bytes(others, teacher=config.teacher.enabled),
        "accepted_updates": done.topology_updates_accepted,
        "updates": done.topology_updates,
        "rule": config.topology.rule,
        # One that moves once, as `magnitude` does, has no cadence to be too slow.
        "moves": build_rule(config.topology, config.rules).moves and hasattr(config.topology, "every"),
    }


def _point(row: ValidationRow, is_stacked: bool) -> CurvePoint:
    seconds = None if is_stacked else row.seconds
    return CurvePoint(step=row.step, tokens=row.tokens, train_flops=row.train_flops, seconds=seconds, loss=row.loss)


def _tuning(out: Path, search: Search, together: set[str]) -> TuningRow:
    trials = {key_of(trial.point): trial for trial in search.trials}
    config = next((t.job.config for t in search.trials if t.point == search.found.point), search.trials[0].job.config)
    last = {look.setting: look for look in search.found.looks}  # it may have been looked along in several rounds
    # Points of equal settings are one run, which is named by the first of them.
    by_run = {trial.job.name: trial for trial in reversed(search.trials)}
    rows = tuple(_trial(out, trial, together) for trial in search.trials if by_run[trial.job.name] is trial)
    # Where every trial diverged none is the best.
    edges = [look for look in last.values() if look.at_edge and not all(row.diverged for row in rows)]
    return TuningRow(
        method=search.variant,
        sparsity=search.sparsity,
        learning_rate=config.training.learning_rate,
        settings=dict(search.found.point),
        at_edge=bool(edges),
        edges=tuple(look.setting for look in edges),
        train_flops=sum(row.train_flops or 0 for row in rows),
        looks=tuple(
            Look(
                setting=look.setting,
                around=dict(look.around),
                values=tuple(look.values),
                added=tuple(look.added),
                best=look.best,
                losses=tuple(_finite(trials[key_of(point)].loss(out)) for point in look.points()),
            )
            for look in search.found.looks
        ),
        trials=rows,
    )


def _trial(out: Path, trial: Trial, together: set[str]) -> TrialRow:
    found = outcome(out / trial.job.name)
    done = found if isinstance(found, Summary) else None
    return TrialRow(
        learning_rate=trial.job.config.training.learning_rate,
        settings=dict(trial.point),
        validation_loss=done.validation_loss if done else None,
        diverged=isinstance(found, Failure),
        steps=found.steps if found else None,
        train_flops=found.train_flops if found else None,
        seconds=done.seconds if done and trial.job.name not in together else None,
        run=trial.job.name,
    )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
