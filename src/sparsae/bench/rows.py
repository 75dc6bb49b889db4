"""Rows of measurements, and how they are read: aligned lines while they come in, tables, Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# What the JSON files hold: strings and numbers by name; None where something could not be measured.
Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: its title, the key of a row or a function of it, the format of a number, its width."""

    title: str
    of: str | Callable[[Row], Any]
    form: str = ""
    width: int = 8

    def cell(self, row: Row) -> str:
        """The text of a row's entry; a dash where there is none."""
        value = self.of(row) if callable(self.of) else row.get(self.of)
        return "-" if value is None else format(value, self.form)


class Sheet:
    """A table whose rows are shown as they are measured; on a terminal a progress bar stands below them.

    The bar moves only between measurements: a thread that redraws it would be measured too.
    """

    def __init__(self, console: Console, title: str, columns: Sequence[Column], total: int) -> None:
        self._console, self._title, self._columns = console, title, columns
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("measuring", total=total)

    def __enter__(self) -> Self:
        self._console.print(self._title, style="bold", markup=False, soft_wrap=True)
        self._line([column.title for column in self._columns], "bold")
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def add(self, rows: Sequence[Row]) -> None:
        """The rows of one more case."""
        for row in rows:
            self._line([column.cell(row) for column in self._columns])
        self._bar.advance(self._task)
        self._bar.refresh()

    def _line(self, cells: Sequence[str], style: str | None = None) -> None:
        padded = (cell.rjust(column.width) for cell, column in zip(cells, self._columns, strict=True))
        self._console.print("  ".join(padded), style=style, markup=False, highlight=False, soft_wrap=True)


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [[column.title for column in columns], ["---:" for _ in columns]]
    lines += [[column.cell(row) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_name(device: torch.device) -> str:
    """What the rows call it: `cpu`, or a GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def groups(rows: Sequence[Row], keys: Sequence[str]) -> Mapping[tuple[Any, ...], list[Row]]:
    """The rows by their values of `keys`, in the order in which they first appear."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
