"""What an experiment found, as tidy rows: one a compared run, and the trials of the learning rates beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsae import __version__
from sparsae.experiments.compare.equal_loss import equal_loss
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.compare.ranking import rank_agreement, summarize_rankings
from sparsae.experiments.compare.stuck import stuck_counts
from sparsae.experiments.compare.summary import conclusions, contrasts, judged_by, summarize, warnings
from sparsae.experiments.compare.tables import contrast_table, results_table
from sparsae.experiments.compare.tasks import summarize_tasks, task_rows, tasks_table
from sparsae.experiments.compare.tuning import Found, Point, key_of
from sparsae.experiments.jobs import Job, outcome, stacked
from sparsae.experiments.matching import Budget
from sparsae.files import to_json, write_atomically
from sparsae.report.tables import notes
from sparsae.rules import build_rule
from sparsae.runs.directory import RunDirectory

# Keys of results.json, at any depth, that a second experiment of the same plan does not repeat.
TIMING = ("seconds", "seconds_by_part", "tokens_per_second", "peak_memory_bytes")
_STACKED = (
    "runs trained together, as one batched program that multiplies by dense matrices: it measures their quality, which "
    "is that of runs one by one, and neither their memory nor their time"
)
_OTHER_STATE = 16  # bytes of a float32 parameter outside the sparse layers: weight, gradient, two moments


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
        loss = (outcome(out / self.job.name) or {}).get("validation_loss")
        return math.inf if loss is None else float(loss)


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
) -> dict[str, Any]:
    """The content of results.json from the runs that are done; trial_share: length of a trial in terms of a run."""
    together = stacked(out)
    rows = [_row(plan, out, cell, together) for cell in cells]
    tuning = [_tuning(out, search, together) for search in searches] if cells else []
    loss = judged_by(rows)
    results: dict[str, Any] = {
        "kind": plan.kind,
        "complete": complete,
        "sparsae": __version__,
        "reference": plan.held_against,
        "judged_by": loss,
        "plan": plan.model_dump(mode="json"),
        "rows": rows,
        "trial_share": trial_share,
        "tuning": tuning,
    }
    if rankings := summarize_rankings(rows):
        results["ranking"] = rankings
    results["summary"] = summarize(rows, plan.held_against, loss, plan.planned)
    results["contrasts"] = contrasts(rows, loss, plan.planned)
    results["equal_loss"] = equal_loss(rows)
    if plan.tasks is not None:
        results["tasks"] = summarize_tasks(rows)
    results["conclusions"] = conclusions(rows, loss)
    results["warnings"] = [*([_STACKED] if any(row["stacked"] for row in rows) else []), *warnings(results)]
    return results


def write_results(results: dict[str, Any], out: Path) -> None:
    """results.json, table.md and table.tex, each whole or not at all."""
    write_atomically(out / "results.json", to_json(results, indent=1) + "\n")
    tables = [results_table(results), *([contrast_table(results)] if results["contrasts"] else [])]
    tables += [tasks_table(results)] if results.get("tasks") else []
    write_atomically(out / "table.md", "\n".join([table.markdown() for table in tables]) + notes(results["warnings"]))
    write_atomically(out / "table.tex", "\n".join(table.latex() for table in tables))


def _row(plan: ComparisonPlan, out: Path, cell: Cell, together: set[str]) -> dict[str, Any]:
    run, config = out / cell.job.name, cell.job.config
    found = outcome(run) or {}
    flops = found.get("train_flops")
    spent: Any = {"flops": flops, "tokens": found.get("tokens"), "steps": found.get("steps")}[cell.budget.match]
    diverged = bool(found.get("diverged"))
    row: dict[str, Any] = {
        "method": cell.variant,
        "seed": cell.seed,
        "sparsity": cell.sparsity,
        "match": cell.budget.match,
        "budget": cell.budget.amount,
        "budget_deviation": None if diverged else spent / cell.budget.amount - 1.0,
        "learning_rate": config.training.learning_rate,
        "settings": dict(cell.point),
        "diverged": diverged,
    }
    copied = (
        "test_loss", "validation_loss", "validation_perplexity", "teacher_validation_loss", "train_flops",
        "train_flops_by_part", "train_flops_dense_equivalent", "tokens", "steps", "parameters", "nnz", "seconds",
        "seconds_by_part", "tokens_per_second", "peak_memory_bytes", "study_flops", "device", "torch",
    )  # fmt: skip
    row |= {key: found.get(key) for key in copied}
    row["stacked"] = cell.job.name in together
    if row["stacked"]:
        row |= dict.fromkeys(TIMING)
    if "train_flops" in row and not diverged:
        others = found["parameters"] - found["nnz"]
        teacher = 4 * others if config.teacher.enabled else 0
        row["state_bytes"] = found["state_bytes_sparse_layers"] + _OTHER_STATE * others + teacher
        row["accepted_updates"], row["updates"] = found["topology_updates_accepted"], found["topology_updates"]
        row["rule"] = config.topology.rule
        # One that moves once, as `magnitude` does, has no cadence to be too slow.
        row["moves"] = build_rule(config.topology, config.rules).moves and hasattr(config.topology, "every")
    row["beside"] = cell.variant not in plan.named_variants
    row["base_method"], row["run"] = plan.all_variants[cell.variant].method, cell.job.name
    metrics = [] if diverged else RunDirectory(run).read_metrics()
    row["curve"], row["stuck"] = _curve(metrics), stuck_counts(metrics)
    if plan.tasks is not None:
        row["tasks"] = task_rows(run)
    if row["study_flops"]:
        row["ranking"] = rank_agreement([entry for entry in metrics if entry.get("kind") == "topology"])
    return row


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = ("step", "tokens", "train_flops", "seconds", "loss")
    return [{key: row[key] for key in keys} for row in rows if row.get("kind") == "validation"]


def _tuning(out: Path, search: Search, together: set[str]) -> dict[str, Any]:
    trials = {key_of(trial.point): trial for trial in search.trials}
    outcomes = [outcome(out / trial.job.name) or {} for trial in search.trials]
    config = next((t.job.config for t in search.trials if t.point == search.found.point), search.trials[0].job.config)
    edges = [look for look in search.found.looks if look.at_edge]
    return {
        "method": search.variant,
        "sparsity": search.sparsity,
        "learning_rate": config.training.learning_rate,
        "settings": dict(search.found.point),
        "at_edge": bool(edges),
        "edges": [look.setting for look in edges],
        "train_flops": sum(result.get("train_flops", 0) for result in outcomes),
        "looks": [
            {
                "setting": look.setting,
                "around": dict(look.around),
                "values": look.values,
                "added": look.added,
                "best": look.best,
                "losses": [_finite(trials[key_of(point)].loss(out)) for point in look.points()],
            }
            for look in search.found.looks
        ],
        "trials": [
            {
                "learning_rate": trial.job.config.training.learning_rate,
                "settings": dict(trial.point),
                "validation_loss": result.get("validation_loss"),
                "diverged": bool(result.get("diverged")),
                "steps": result.get("steps"),
                "train_flops": result.get("train_flops"),
                "seconds": None if trial.job.name in together else result.get("seconds"),
                "run": trial.job.name,
            }
            for trial, result in zip(search.trials, outcomes, strict=True)
        ],
    }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
