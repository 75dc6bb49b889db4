"""What the commands share: arguments, results as JSON, tables, numbers as people read them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsae.files import to_json, write_atomically
from sparsae.report.readable import duration

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


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], names: int = 1) -> None:
    """A rich table on a terminal, aligned plain lines elsewhere."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, show_header=any(columns), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index >= names and any(columns) else "left")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = ([list(columns)] if any(columns) else []) + cells
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    numeric = any(columns)  # every table with a header has numbers after the columns of names
    typer.echo(title)
    for line in lines:
        padded = [
            cell.rjust(width) if index >= names and numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo(("  " + "  ".join(padded)).rstrip())
