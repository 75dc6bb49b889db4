"""Whether strategy evolution is worth anything: runs whose numbers evolve against their placebo and fixed numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sparsae.experiments.compare.record import Results
from sparsae.experiments.statistics import Difference, paired_difference
from sparsae.report import markup
from sparsae.report.readable import UNKNOWN, sparsity_text
from sparsae.rules.parts.strategy import GENE
from sparsae.runs.directory import RunDirectory
from sparsae.runs.rows import TopologyRow

EVOLVED, PLACEBO, FIXED = "sparsae-evolved", "sparsae-placebo", "sparsae"
_WHAT = {PLACEBO: "its placebo", FIXED: "fixed numbers"}


def strategy_section(results: Results, runs: Mapping[tuple[str, float], Path]) -> str:
    """The section of a comparison that has runs whose numbers evolve; else nothing.

    runs: directories of the first seed's, by method and sparsity.
    """
    methods = {row.base_method for row in results.rows}
    if not methods & {EVOLVED, PLACEBO}:
        return ""
    lead = (
        "Genomes of the placebo mutate alike, but get the credits of others: only what evolution gains over it, seed "
        "by seed, is due to the measured progress."
    )
    said = [sentence for sentence, _ in verdicts(results)]
    return markup.section("strategy", "Strategy evolution", lead, markup.notes(said), _genomes(results, runs))


def verdicts(results: Results) -> Iterator[tuple[str, Difference | None]]:
    """For each sparsity what may be said of evolved numbers against the placebo and against fixed ones."""
    for sparsity in dict.fromkeys(row.sparsity for row in results.rows):
        losses, where = _losses(results, sparsity), f"{sparsity_text(sparsity)} sparsity"
        failed = {row.base_method for row in results.rows if row.sparsity == sparsity and row.diverged}
        for name in (PLACEBO, FIXED):
            if EVOLVED in losses and (name == PLACEBO or name in losses):
                difference = paired_difference(losses[EVOLVED], losses.get(name, {}))
                if difference and failed & {EVOLVED, name}:
                    yield f"{where}: evolution is not shown to beat {_WHAT[name]}: a run diverged.", None
                else:
                    yield f"{where}: {_said(name, difference)}", difference


def _losses(results: Results, sparsity: float) -> dict[str, dict[int, float]]:
    """By method and seed; of a method in several variants the first."""
    found: dict[str, dict[int, float]] = {}
    variants: dict[str, str] = {}
    for row in results.rows:
        method = row.base_method
        if row.sparsity == sparsity and variants.setdefault(method, row.method) == row.method:
            seeds = found.setdefault(method, {})
            if not row.diverged and (loss := row.loss(results.judged_by)) is not None:
                seeds[row.seed] = loss
    return found


def _said(other: str, difference: Difference | None) -> str:
    what = _WHAT[other]
    if difference is None:
        return f"nothing says whether evolution beats {what}: no seed has runs of {EVOLVED} and {other} that ended."
    interval = difference.interval
    number = f"{EVOLVED} less {other} is {interval.mean:+.4f} nats"
    if interval.low is None or interval.high is None:
        return f"evolution is not shown to beat {what}: {number}, of one seed."
    number = f"{number} (95 %: {interval.low:+.4f} to {interval.high:+.4f}, {interval.n} seeds)"
    if difference.verdict == "better":
        return f"evolution beats {what}: {number}."
    worse = "is worse than" if difference.verdict == "worse" else "does not beat"
    advice = "; use fixed numbers" if other == PLACEBO else ""
    return f"evolution {worse} {what}: {number}{advice}."


def _genomes(results: Results, runs: Mapping[tuple[str, float], Path]) -> str:
    """The first genome of each run, and the mean of those in the last quarter of its updates."""
    based = {row.method: row.base_method for row in results.rows}
    rows: dict[str, dict[str, str]] = {}
    for (method, sparsity), path in runs.items():
        if based.get(method) in (EVOLVED, PLACEBO):
            updates = [row for row in RunDirectory(path).read_metrics(TopologyRow) if row.step]
            if updates:
                last = updates[-max(1, len(updates) // 4) :]
                rows[f"{method} · {sparsity_text(sparsity)}"] = {
                    key: f"{updates[0].number(key):.3g} → {sum(row.number(key) for row in last) / len(last):.3g}"
                    for key in updates[0].numbers
                    if key.startswith(GENE)
                }
    genes = list(dict.fromkeys(gene for row in rows.values() for gene in row))
    if not genes:
        return ""
    title = "Genomes: the first, and the mean in the last quarter of the updates (first seed)"
    cells = [[name, *(row.get(gene, UNKNOWN) for gene in genes)] for name, row in rows.items()]
    return markup.table(title, ["run", *(gene.removeprefix(GENE) for gene in genes)], cells)
