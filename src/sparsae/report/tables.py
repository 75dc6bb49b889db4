"""A table for the terminal, Markdown and LaTeX: one set of cells, three notations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsae.report.readable import UNKNOWN

if TYPE_CHECKING:
    from sparsae.core.intervals import Interval

_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$"}
_LATEX |= {"–": "--", "<": "$<$", ">": "$>$", "|": r"$\vert$", "≥": r"$\geq$", "≤": r"$\leq$", "→": r"$\to$"}
_LATEX |= {"α": r"$\alpha$", "β": r"$\beta$", "λ": r"$\lambda$", "τ": r"$\tau$", "µ": r"$\mu$", "μ": r"$\mu$"}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `names` columns name the row, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 2
    details: Sequence[str] = ()
    """Columns that a terminal and a printed page have no room for."""

    def brief(self) -> Table:
        """What fits a terminal."""
        kept = [index for index, column in enumerate(self.columns) if column not in self.details]
        rows = [[row[index] for index in kept] for row in self.rows]
        return Table(self.title, [self.columns[index] for index in kept], rows, self.names)

    def markdown(self) -> str:
        """As Markdown."""
        marks = ["---" if index < self.names else "---:" for index in range(len(self.columns))]
        lines = [self.columns, marks, *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        return f"{self.title}\n\n{body}\n"

    def latex(self) -> str:
        """As a LaTeX table for the package booktabs: its brief form, a rule between groups of the first column."""
        brief = self.brief()
        layout = "l" * self.names + "r" * (len(brief.columns) - self.names)
        lines = [" & ".join(map(_escaped, brief.columns)) + r" \\", r"\midrule"]
        for before, row in zip([None, *brief.rows], brief.rows, strict=False):
            if before is not None and before[0] != row[0]:
                lines.append(r"\midrule")
            lines.append(" & ".join(map(_escaped, row)) + r" \\")
        body = "\n".join(f"    {line}" for line in [r"\toprule", *lines, r"\bottomrule"])
        return (
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{_escaped(self.title)}}}\n"
            f"  \\begin{{tabular}}{{{layout}}}\n{body}\n  \\end{{tabular}}\n\\end{{table}}\n"
        )


def interval_text(interval: Interval | None, signed: bool = False) -> str:
    """`3.4512 ± 0.0123`: four decimals, more where there would be one digit or none left of either."""
    if interval is None:
        return UNKNOWN
    half = None if interval.high is None else interval.high - interval.mean
    # By the uncertainty, or by what is known for certain.
    size = half or abs(interval.mean)
    places = max(4, 1 - math.floor(math.log10(size))) if 1e-8 < size < 1e-3 else 4
    mean = f"{interval.mean:{'+' if signed else ''}.{places}f}".replace("-", "−")
    return mean if half is None else f"{mean} ± {half:.{places}f}"


def notes(warnings: Sequence[str]) -> str:
    """What a reader of a table must know, as Markdown beneath it; empty where there is nothing."""
    return "".join(["\n", *(f"- Warning: {warning}\n" for warning in warnings)]) if warnings else ""


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
