"""The results as a table, for the terminal, Markdown and LaTeX: one set of cells, three notations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsae.experiments.summary import FEW_UPDATES, decisive_p
from sparsae.report.readable import UNKNOWN, compact, percent

_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$"}
_LATEX |= {"–": "--", "α": r"$\alpha$"}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `names` columns name the row, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 2
    tuned: Sequence[str] = ()
    """Columns of settings that were tuned beside the learning rate."""

    def brief(self) -> Table:
        """What fits a terminal: without the columns that say how a run was, and what it weighs."""
        left_out = {"learning rate", *self.tuned, "tokens", "updates", "parameters", "state", "equivalent tokens"}
        kept = [index for index, column in enumerate(self.columns) if column not in left_out]
        rows = [[row[index] for index in kept] for row in self.rows]
        return Table(self.title, [self.columns[index] for index in kept], rows, self.names)

    def markdown(self) -> str:
        """As Markdown."""
        marks = ["---" if index < self.names else "---:" for index in range(len(self.columns))]
        lines = [self.columns, marks, *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        return f"{self.title}\n\n{body}\n"

    def latex(self) -> str:
        """As a LaTeX table for the package booktabs, a rule between groups of the first column."""
        layout = "l" * self.names + "r" * (len(self.columns) - self.names)
        lines = [" & ".join(map(_escaped, self.columns)) + r" \\", r"\midrule"]
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            if before is not None and before[0] != row[0]:
                lines.append(r"\midrule")
            lines.append(" & ".join(map(_escaped, row)) + r" \\")
        body = "\n".join(f"    {line}" for line in [r"\toprule", *lines, r"\bottomrule"])
        return (
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{_escaped(self.title)}}}\n"
            f"  \\begin{{tabular}}{{{layout}}}\n{body}\n  \\end{{tabular}}\n\\end{{table}}\n"
        )


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
    return Table(f"{title}: final {loss}, mean ± half of the 95 % interval.", columns, _rows(results), tuned=tuned)


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


def interval_text(interval: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`3.4512 ± 0.0123`."""
    if interval is None:
        return UNKNOWN
    mean = f"{interval['mean']:{'+' if signed else ''}.4f}".replace("-", "−")
    return mean if interval["high"] is None else f"{mean} ± {interval['high'] - interval['mean']:.4f}"


def _updates(count: float | None) -> str:
    """Updates a run; marked where a rule made so few that it hardly moved."""
    if not count:
        return UNKNOWN
    return f"{count:.4g}" + (" (few)" if count < FEW_UPDATES else "")


def notes(warnings: Sequence[str]) -> str:
    """What a reader of a table must know, as Markdown beneath it; empty where there is nothing."""
    return "".join(["\n", *(f"- Warning: {warning}\n" for warning in warnings)]) if warnings else ""


def _mark(verdict: str) -> str:
    """A star where a difference is decided."""
    return " *" if verdict in ("better", "worse") else ""


def _p(p: float | None) -> str:
    if p is None:
        return UNKNOWN
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _compact(value: float | None, unit: str = "") -> str:
    return compact(value, unit) if value is not None else UNKNOWN


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
