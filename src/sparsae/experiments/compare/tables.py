"""The tables of a comparison."""

from __future__ import annotations

from sparsae.experiments.compare.record import Contrast, Results, SummaryRow
from sparsae.experiments.compare.summary import FEW_UPDATES, decisive_p
from sparsae.report.readable import UNKNOWN, compact, in_short, percent, sparsity_text
from sparsae.report.tables import Table, interval_text


def results_table(results: Results) -> Table:
    """Loss, difference and cost of each method at each sparsity."""
    reference, asked = results.reference, results.asked
    seeds = len(asked.seeds)
    columns = [
        "sparsity", "method", "learning rate", *map(_short, tuned_beside(results)), "steps", "tokens", "FLOPs",
        "updates", "parameters", "state", "loss (nats)", f"difference from {reference}", "p",
        "equivalent tokens",
    ]  # fmt: skip
    title = f"{asked.preset}, matched on {asked.match}, {seeds} seed{'s' if seeds > 1 else ''}"
    loss = results.judged_by.replace("_", " ")
    tuned = [_short(setting) for setting in tuned_beside(results)]
    # How a run was, and what it weighs.
    details = ["learning rate", *tuned, "tokens", "updates", "parameters", "state", "equivalent tokens"]
    title = f"{title}: final {loss}, mean ± half of the 95 % interval; * where p < 0.05, "
    title += "adjusted by Holm's method unless the contrast was planned."
    return Table(title, columns, _rows(results), details=details)


def tuned_beside(results: Results) -> list[str]:
    """Settings that were tuned beside the learning rate."""
    return list(results.asked.tuning.grid)


def _short(setting: str) -> str:
    return setting.rpartition(".")[2].replace("_", " ")


def _tuned(entry: SummaryRow, setting: str) -> str:
    value = entry.settings.get(setting)
    return UNKNOWN if value is None else in_short(value)


def contrast_table(results: Results) -> Table:
    """The planned contrasts at each sparsity."""
    rows = [
        [
            sparsity_text(entry.sparsity),
            f"{entry.a} less {entry.b}",
            str(entry.difference.n) if entry.difference else UNKNOWN,
            _difference(entry),
            _p(entry.difference.p if entry.difference else None),
        ]
        for entry in results.contrasts
    ]
    title = "Planned contrasts: paired differences in nats, mean ± half of the 95 % interval, p not adjusted."
    return Table(title, ["sparsity", "contrast", "seeds", "difference", "p"], rows)


def rank_table(results: Results) -> Table:
    """How well micro-batches rank candidates, by method and sparsity."""
    columns = ["sparsity", "method", "updates, all seeds", "Kendall's tau", "correlation", "accepted", "final loss"]
    losses = {(entry.sparsity, entry.method): entry for entry in results.summary}
    rows = []
    for entry in results.ranking or ():
        of = losses.get((entry.sparsity, entry.method))
        share = of.accepted_updates / of.updates if of and of.updates and of.accepted_updates is not None else None
        rows.append(
            [
                sparsity_text(entry.sparsity),
                entry.method,
                str(entry.updates),
                interval_text(entry.kendall_tau),
                interval_text(entry.correlation),
                UNKNOWN if share is None else percent(share),
                interval_text(of.loss(results.judged_by) if of else None),
            ]
        )
    return Table(
        "Micro-batch against the whole validation set, mean ± half of the 95 % interval over seeds.", columns, rows
    )


def _rows(results: Results) -> list[list[str]]:
    rows = []
    for entry in results.summary:
        equivalent = entry.equivalent_tokens
        rows.append(
            [
                sparsity_text(entry.sparsity),
                entry.method,
                in_short(entry.learning_rate),
                *(_tuned(entry, setting) for setting in tuned_beside(results)),
                f"{entry.steps:,.0f}" if entry.steps is not None else UNKNOWN,
                _compact(entry.tokens),
                _compact(entry.train_flops),
                _updates(entry.updates),
                _compact(entry.parameters),
                _compact(entry.state_bytes, "B"),
                _loss(entry, results),
                _difference(entry),
                _p(decisive_p(entry)) + (" planned" if entry.planned else ""),
                f"{equivalent.ratio:.2f} ×" if equivalent and equivalent.ratio is not None else UNKNOWN,
            ]
        )
    return rows


def _loss(entry: SummaryRow, results: Results) -> str:
    """Of the runs that ended, and how many did not."""
    found = entry.loss(results.judged_by)
    if not entry.diverged:
        return interval_text(found)
    return f"{interval_text(found)} ({entry.diverged} diverged)" if found else "diverged"


def _updates(count: float | None) -> str:
    """Updates a run; marked where a rule made so few that it hardly moved."""
    if not count:
        return UNKNOWN
    return f"{count:.4g}" + (" (few)" if count < FEW_UPDATES else "")


def _difference(entry: SummaryRow | Contrast) -> str:
    """With a star where it is decided."""
    text = interval_text(entry.difference.interval if entry.difference else None, signed=True)
    return text + (" *" if entry.verdict in ("better", "worse") else "")


def _p(p: float | None) -> str:
    if p is None:
        return UNKNOWN
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _compact(value: float | None, unit: str = "") -> str:
    return compact(value, unit) if value is not None else UNKNOWN
