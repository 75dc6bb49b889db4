"""`sparsae watch`: a run as it goes on, read from its files by another process."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsae.errors import InputError
from sparsae.files import holds_files
from sparsae.report.readable import compact, count, decimal, duration
from sparsae.runs.directory import RunDirectory
from sparsae.runs.lock import LOCK, is_locked

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparsae.report.data import RunData
    from sparsae.runs.rows import TrainRow

_BARS = "▁▂▃▄▅▆▇█"
_LATE = 20  # rows that tell how long a step takes
_PAGE = 30.0  # seconds between two pages


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)],
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")] = 2.0,
    page: Annotated[bool, typer.Option("--page", help="Write report.html again and again; it reloads itself.")] = False,
) -> None:
    """Show how a run goes, until it ends."""
    from rich.console import Console
    from rich.live import Live

    # One that is being set up, which takes as long as its text takes to read, has nothing but its lock yet.
    while is_locked(run) and not holds_files(run, but=LOCK):
        time.sleep(every)
    directory, console = RunDirectory.open(run), Console(highlight=False)
    written, last = -math.inf, ""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            # Looked at before the files: whoever ends in between has written everything.
            goes_on = is_locked(directory.path)
            data = _read(run, waiting=goes_on)
            if page and data is not None and (not goes_on or time.monotonic() - written >= _PAGE):
                written = time.monotonic()
                _write(run, waiting=goes_on)
            line = _line(data, goes_on)
            if console.is_terminal:
                live.update(_view(run, data, line), refresh=True)
            elif line != last:
                typer.echo(line)
            last = line
            if not goes_on:
                return
            time.sleep(every)


def _write(run: Path, waiting: bool) -> None:
    """The report; again a little later where a run that goes on was caught between two states."""
    from sparsae.report.page import write_report

    try:
        write_report(run)
    except InputError:
        if not waiting:
            raise


def _read(run: Path, waiting: bool) -> RunData | None:
    """What the run has written; None where it has only begun."""
    from sparsae.report.data import read_run

    try:
        return read_run(run)
    except InputError:
        if waiting:
            return None
        raise


def _line(data: RunData | None, goes_on: bool) -> str:
    """Where the run is, on one line."""
    if data is None:
        return "no metrics yet"
    steps = data.config.training.steps
    parts = [f"step {count(data.steps)} of {count(steps)}"]
    if data.train:
        row = data.train[-1]
        parts += [f"loss {decimal(row.cross_entropy, 4)}", f"{compact(row.tokens_per_second)} tokens/s"]
        if goes_on:
            parts.append(f"{duration((steps - row.step) * _pace(data.train))} left")
    if data.validation:
        parts.append(f"validation {decimal(data.validation[-1].loss, 4)}")
    if data.updates:
        parts.append(f"{count(len(data.updates))} updates")
    if not goes_on:
        totals = data.totals
        ended = "not going on"
        if totals is not None:
            ended = "diverged" if totals.diverged else "finished" if totals.finished else "stopped"
        parts.append(ended)
    return ", ".join(parts)


def _pace(rows: Sequence[TrainRow]) -> float:
    """Seconds a step of late, validations and updates of the topology included."""
    first, last = rows[max(0, len(rows) - _LATE)], rows[-1]
    if first is last:
        return last.seconds / last.step
    return (last.seconds - first.seconds) / (last.step - first.step)


def _view(run: Path, data: RunData | None, line: str) -> RenderableType:
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_row("", Text(line))
    if data is not None:
        grid.add_row("steps", ProgressBar(total=data.config.training.steps, completed=data.last_step, width=60))
        grid.add_row("training", Text(spark([row.cross_entropy for row in data.train])))
        grid.add_row("validation", Text(spark([row.loss for row in data.validation])))
    return Panel(grid, title=Text(str(run)), title_align="left")


def spark(values: list[float], width: int = 60) -> str:
    """A curve as one line of blocks, its last `width` values; what is no number is a space."""
    shown = values[-width:]
    known = [value for value in shown if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in shown)
