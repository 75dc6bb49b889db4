"""The page of an experiment: report.html, from results.json and the runs beside it; needs no network, no script."""

from __future__ import annotations

from pathlib import Path

from sparsae.errors import InputError
from sparsae.experiments.directory import RESULTS
from sparsae.experiments.kind import Kind, Results
from sparsae.experiments.registry import kind_in
from sparsae.files import read_json
from sparsae.report import page


def write_page(out: Path, figures: Path | None = None) -> Path:
    """Write report.html of the experiment in a directory; returns its path. figures: gets every figure as a file.

    Raises InputError where there are no results yet or a file is damaged.
    """
    file = out / RESULTS
    if not file.is_file():
        raise InputError(f"{out}: no results yet; run the experiment first")
    tree = read_json(file)
    kind = kind_in(tree, str(file))
    results = kind.read(tree, str(file))
    if not results.rows:
        raise InputError(f"{file}: no run has ended yet")
    return write_page_of(kind, results, out, figures)


def write_page_of(kind: Kind, results: Results, out: Path, figures: Path | None = None) -> Path:
    """The same, from results that are at hand."""
    return page.write_page(
        out / "report.html", lambda: page.document(kind.title(results), kind.body(results, out)), figures
    )
