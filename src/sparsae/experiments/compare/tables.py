"""The tables of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsae.experiments.compare.summary import FEW_UPDATES, decisive_p
from sparsae.report.readable import UNKNOWN, compact, percent
from sparsae.report.tables import Table, interval_text


def results_table(results: Mapping[str, Any]) -> Table:
    """Loss, difference and cost of each method at each sparsity."""
    reference, plan = results["reference"], results["plan"]
    seeds = len(plan["seeds"])
    columns = [
        "sparsity", "method", "learning rate", *map(_short, tuned_beside(results)), "steps", "tokens", "FLOPs",
        "updates", "parameters", "state", "loss (nats)", f"less {reference}", "p (Holm)", "equivalent tokens",
    ]  # fmt: skip
    title = f"{plan['preset']}, matched on {plan['match']}, {seeds} seed{'s' if seeds > 1 else ''}"
    loss = compared_loss(results).replace("_", " ")
    tuned = [_short(setting) for setting in tuned_beside(results)]
    # How a run was, and what it weighs.
    details = ["learning rate", *tuned, "tokens", "updates", "parameters", "state", "equivalent tokens"]
    title = f"{title}: final {loss}, mean ± half of the 95 % interval."
    return Table(title, columns, _rows(results), details=details)


def compared_loss(results: Mapping[str, Any]) -> str:
    """The key of the loss that was compared."""
    return str(results["judged_by"])


def tuned_beside(results: Mapping[str, Any]) -> list[str]:
    """Settings that were tuned beside the learning rate."""
    return list(results["plan"]["tuning"]["grid"])


def _short(setting: str) -> str:
    return setting.rpartition(".")[2].replace("_", " ")


def _tuned(entry: Mapping[str, Any], setting: str) -> str:
    value = entry["settings"].get(setting)
    return UNKNOWN if value is None else f"{value:g}"


def contrast_table(results: Mapping[str, Any]) -> Table:
    """The planned contrasts at each sparsity."""
    rows = [
        [
            percent(entry["sparsity"]),
            f"{entry['a']} less {entry['b']}",
            str(entry["difference"]["n"]) if entry["difference"] else UNKNOWN,
            interval_text(entry["difference"], signed=True) + _mark(entry["verdict"]),
            _p(entry["difference"] and entry["difference"]["p"]),
        ]
        for entry in results["contrasts"]
    ]
    title = "Planned contrasts: paired differences in nats, mean ± half of the 95 % interval, p not adjusted."
    return Table(title, ["sparsity", "contrast", "seeds", "difference", "p"], rows)


def rank_table(results: Mapping[str, Any]) -> Table:
    """How well micro-batches rank candidates, by method and sparsity."""
    columns = ["sparsity", "method", "updates", "Kendall's tau", "correlation", "accepted", "final loss"]
    losses = {(e["sparsity"], e["method"]): e for e in results["summary"]}
    rows = []
    for entry in results["ranking"]:
        of = losses[entry["sparsity"], entry["method"]]
        share = of["accepted_updates"] / of["updates"] if of["updates"] else None
        rows.append(
            [
                percent(entry["sparsity"]),
                entry["method"],
                str(entry["updates"]),
                interval_text(entry["kendall_tau"]),
                interval_text(entry["correlation"]),
                UNKNOWN if share is None else percent(share),
                interval_text(of[compared_loss(results)]),
            ]
        )
    return Table(
        "Micro-batch against the whole validation set, mean ± half of the 95 % interval over seeds.", columns, rows
    )


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows, judged_by = [], compared_loss(results)
    for entry in results["summary"]:
        difference, equivalent = entry["difference"], entry["equivalent_tokens"]
        rows.append(
            [
                percent(entry["sparsity"]),
                entry["method"],
                f"{entry['learning_rate']:g}",
                *(_tuned(entry, setting) for setting in tuned_beside(results)),
                f"{entry['steps']:,.0f}" if entry["steps"] is not None else UNKNOWN,
                *(_compact(entry[key]) for key in ("tokens", "train_flops")),
                _updates(entry["updates"]),
                _compact(entry["parameters"]),
                _compact(entry["state_bytes"], "B"),
                interval_text(entry[judged_by]),
                interval_text(difference, signed=True) + _mark(entry["verdict"]),
                _p(decisive_p(entry)) + (" planned" if entry["planned"] else ""),
                f"{equivalent['ratio']:.2f} ×" if equivalent and equivalent["ratio"] is not None else UNKNOWN,
            ]
        )
    return rows


def _updates(count: float | None) -> str:
    """Updates a run; marked where a rule made so few that it hardly moved."""
    if not count:
        return UNKNOWN
    return f"{count:.4g}" + (" (few)" if count < FEW_UPDATES else "")


def _mark(verdict: str) -> str:
    """A star where a difference is decided."""
    return " *" if verdict in ("better", "worse") else ""


def _p(p: float | None) -> str:
    if p is None:
        return UNKNOWN
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _compact(value: float | None, unit: str = "") -> str:
    return compact(value, unit) if value is not None else UNKNOWN
