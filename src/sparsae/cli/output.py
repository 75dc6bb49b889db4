"""What the commands share: arguments, results as JSON, tables, numbers as people read them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from sparsae.files import to_json, write_atomically
from sparsae.report.readable import duration

if TYPE_CHECKING:
    from rich.table import Table

JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)]
Best = Annotated[
    bool, typer.Option("--best", help="Use the checkpoint of the best validation (training.keep_best), not the newest.")
]
Teacher = Annotated[bool, typer.Option("--teacher", help="Use the teacher (the average) instead of the student.")]
EXIT_RANKS, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def output(json_file: str | None, part: str | None = None) -> Iterator[dict[str, Any]]:
    """A dictionary to fill, written as JSON at the end, or one part of it; until then standard output is left alone."""
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr) if json_file == "-" else contextlib.nullcontext():
        yield result
    text = to_json(result if part is None else result[part], indent=2)
    if json_file == "-":
        typer.echo(text)
    elif json_file is not None:
        write_atomically(Path(json_file), text + "\n")


def show_values(title: str, values: Mapping[str, Any]) -> None:
    """A result as two columns; the parts of a value that has parts stand below each other."""
    rows: list[tuple[str, ...]] = []
    for key, value in values.items():
        for name, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            is_time = key.endswith(("seconds", "seconds_by_part")) and isinstance(part, int | float)
            rows.append((f"{key}.{name}" if name else key, duration(part) if is_time else readable(part)))
    show_table(title, ("", ""), rows)


def readable(value: object) -> str:
    """A value of a result in a few characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and abs(value) >= 1e12:
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e6 <= abs(value) < 1e12 else f"{value:.6g}"
    return str(value)


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], names: int = 1, file: IO[str] | None = None
) -> None:
    """A rich table on a terminal, aligned plain lines elsewhere; file: standard output where it is None.

    Nothing is cut: on a terminal that is too narrow for a header's columns each row is a record of several lines.
    """
    file, cells = file or sys.stdout, [[str(cell) for cell in row] for row in rows]
    lines = ([list(columns)] if any(columns) else []) + cells
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    if file.isatty():
        from rich.console import Console

        console = Console(file=file)
        if any(columns) and sum(widths) + 3 * len(widths) + 1 > console.width:
            console.print(title, style="bold", markup=False, highlight=False)
            for text in _records(columns, cells, names, console.width):
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(_rich(title, columns, cells, names))
        return
    numeric = any(columns)  # every table with a header has numbers after the columns of names
    typer.echo(title, file)
    for line in lines:
        padded = [
            cell.rjust(width) if index >= names and numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo(("  " + "  ".join(padded)).rstrip(), file)


def _rich(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], names: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=any(columns), title_justify="left")
    for index, column in enumerate(columns):
        numeric = index >= names and any(columns)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _records(columns: Sequence[str], cells: Sequence[Sequence[str]], names: int, width: int) -> Iterator[str]:
    """Each row as its names, and below them its numbers, each behind its column's heading, as many on a line as fit."""
    for row in cells:
        yield " · ".join(cell for cell in row[:names] if cell)
        line = " "
        for column, cell in zip(columns[names:], row[names:], strict=True):
            part = f" {column} {cell}" if line == " " else f" · {column} {cell}"
            if line != " " and len(line) + len(part) > width:
                yield line
                line, part = " ", f" {column} {cell}"
            line += part
        if line != " ":
            yield line
