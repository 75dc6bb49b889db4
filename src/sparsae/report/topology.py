"""The page of a topology alone: of a training by other people's loop, which has updates and no run directory."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from sparsae.config import Config
from sparsae.files import write_atomically
from sparsae.report.data import RunData
from sparsae.report.page import document
from sparsae.search.rows import TopologyRow


def write_topology(page: Path, title: str, rows: Iterable[TopologyRow]) -> None:
    """Write what became of a topology as the HTML file `page`, whole or not at all.

    rows: that of the first topology (`TopologySearch.initial_row`) and those of updates (`Update.record`).
    """
    from sparsae.report.sections import density, movement  # with matplotlib

    # These sections look at nothing else of a run.
    run = RunData(page, Config(), (), (), tuple(rows), None, None)
    body = f"<header>\n<h1>{escape(title)}</h1>\n</header>\n<main>\n{density(run)}\n{movement(run)}\n</main>"
    write_atomically(page, document(title, body))
