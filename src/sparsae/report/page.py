"""The page of a run: report.html, which needs no network and no script.

matplotlib is imported only once the run was read, so that a run that cannot be reported is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from sparsae.errors import InputError
from sparsae.files import write_atomically
from sparsae.report.data import RunData, read_run
from sparsae.runs.directory import RunDirectory
from sparsae.runs.lock import is_locked

RELOADED = 15  # seconds; what writes the page while a run continues is `sparsae watch --page`


def write_report(run: Path, figures: Path | None = None) -> Path:
    """Write report.html of the run in the directory `run`, whole or not at all; returns its path.

    figures: a directory that gets every figure as SVG and PDF.

    A run that is still going on, was stopped, or never changes its topology is reported as far as it came. Raises
    InputError where there is no run or no metrics yet, where a file is damaged, or where the page cannot be written.
    """
    found = read_run(run)
    return write_page(RunDirectory(run).report, lambda: render(found), figures)


def write_reports(runs: Sequence[Path], page: Path, figures: Path | None = None) -> Path:
    """Write one page of several runs; as `write_report`. Raises InputError also where a run is given twice."""
    from sparsae.report.several import read_runs

    found = read_runs(runs)

    def rendered() -> str:
        from sparsae.report.several import body, title

        return document(title(found), body(found))

    return write_page(page, rendered, figures)


def write_page(page: Path, rendered: Callable[[], str], figures: Path | None = None) -> Path:
    """Write a page, whole or not at all, and its figures into a directory where one is named; returns the page's path.

    Raises InputError where they cannot be written.
    """
    from sparsae.report.svg import collected

    with collected() as panels:
        text = rendered()
    try:
        write_atomically(page, text)
        if figures is not None:
            from sparsae.report.figure_files import write_figures

            write_figures(figures, panels)
    except OSError as error:
        place = error.filename or page
        raise InputError(f"{place}: cannot be written: {error.strerror}; free the space or the permission") from None
    return page


def render(run: RunData) -> str:
    """The page of a run as HTML."""
    from sparsae.report.sections import body, title

    return document(title(run), body(run), refresh=RELOADED if is_locked(run.path) and run.totals is None else None)


def document(title: str, body: str, refresh: int | None = None) -> str:
    """A whole page that needs nothing but itself: `title` is text, `body` markup.

    refresh: seconds after which a browser reads it again, of what is not over.
    """
    reload = "" if refresh is None else f'\n<meta http-equiv="refresh" content="{refresh}">'
    style = resources.files("sparsae.report").joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="sparsae">{reload}
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<div class="page">
{body}
</div>
</body>
</html>
"""
