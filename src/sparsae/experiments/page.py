"""The page of an experiment: report.html, from results.json and the runs beside it; needs no network, no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsae.errors import InputError
from sparsae.experiments.kind import Kind
from sparsae.experiments.registry import kind_in
from sparsae.files import read_json, write_atomically
from sparsae.report.page import document


def write_page(out: Path) -> Path:
    """Write report.html of the experiment in a directory; returns its path.

    Raises InputError where there are no results yet or a file is damaged.
    """
    file = out / "results.json"
    if not file.is_file():
        raise InputError(f"{out}: no results yet; run the experiment first")
    tree = read_json(file)
    if not tree.get("rows"):
        raise InputError(f"{file}: no run has ended yet")
    kind = kind_in(tree, str(file))
    return write_page_of(kind, kind.of_now(tree), out)


def write_page_of(kind: Kind, results: Mapping[str, Any], out: Path) -> Path:
    """The same, from results that are at hand."""
    page = out / "report.html"
    write_atomically(page, document(kind.title(results), kind.body(results, out)))
    return page
