"""`sparsae check ...`: whether a parameterization does what it is for, and how much of a model can be pruned."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from sparsae.cli.experiments import (
    Given,
    Heads,
    Method,
    Parameterizations,
    Settings,
    grid_options,
    options_of,
    read,
)
from sparsae.cli.listing import Preset
from sparsae.cli.lists import numbers_in
from sparsae.cli.output import Best, JsonFile, Teacher, output, show_table
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments.coordinates.plan import CoordinatesPlan
from sparsae.files import refuse_unwritable
from sparsae.runs.claim import refuse_occupied

check = typer.Typer()


@check.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Check that a parameterization keeps scales over widths and densities, or how much of a model can be pruned."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@check.command()
def coordinates(
    given: Given = None,
    *,
    settings: Settings = None,
    parameterizations: Parameterizations = None,
    widths: Annotated[
        str | None, typer.Option(metavar="LIST", help="Model widths.  (default: 128,256,512,1024)")
    ] = None,
    sparsities: Annotated[
        str | None, typer.Option(metavar="LIST", help="0: dense.  (default: 0 and 1 - 2^-1 to 1 - 2^-7)")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps that are measured.  (default: 10)")] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Transformer blocks.  (default: 2)")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="F", help="Of every step, without warm-up.  (default: 2^-9)")
    ] = None,
    least_fan_in: Annotated[
        float | None,
        typer.Option(metavar="N", help="Slopes over layers whose outputs sum at least so many weights.  (default: 0)"),
    ] = None,
    method: Method = None,
    heads: Heads = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|LIST", help="How many seeds, or which: 3, or 0,1,2.  (default: 1)")
    ] = None,
    preset: Preset = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new directory for report.html and coordinates.json.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the slopes as JSON; - for standard output.")
    ] = None,
) -> None:
    """Scales of activations, gradients and updates in the first steps, and their slopes over densities and widths."""
    refuse_unwritable("--json", json_file)
    options = grid_options(preset, method, heads, parameterizations, widths, sparsities, seeds)
    own = {"steps": steps, "layers": layers, "learning_rate": learning_rate, "least_fan_in": least_fan_in}
    options |= options_of(own)
    plan = read(given, settings, options, CoordinatesPlan)
    if out is not None:
        refuse_occupied(out)
    with output(json_file, "rows") as result:
        from sparsae.experiments.coordinates.experiment import Coordinates
        from sparsae.experiments.coordinates.page import slope_table

        found = Coordinates(plan, out, quiet=json_file == "-").run()
        result.update(encode(found))
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if json_file == "-":
        return
    table = slope_table(found)
    show_table(table.title, table.columns, table.rows, table.names)
    if out is not None:
        typer.echo(f"written: {out / 'report.html'}, coordinates.json")


@check.command()
def sparsity(
    model: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, or a directory of transformers'.", show_default=False),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Text: a path, a glob, stdlib or hf:NAME.  (default: the run's held-out text)"
        ),
    ] = None,
    sparsities: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Shares of zeros.  (default: 0.1 to 0.95 of the weights that exist)"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of the text; every sparsity reads them twice.")
    ] = 65_536,
    tolerance: Annotated[
        float, typer.Option(min=0.0, metavar="F", help="Rise of the loss, as a share, that counts as none.")
    ] = 0.01,
    teacher: Teacher = False,
    best: Best = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new directory for report.html and sparsity.json.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Essential sparsity: loss on held-out text after one-shot magnitude pruning, uniform over layers and global."""
    refuse_unwritable("--json", json_file)
    shares = None if sparsities is None else numbers_in("--sparsities", sparsities, float)
    for share in shares or []:
        if not 0.0 < share < 1.0:
            raise InputError(f"--sparsities: {share:g} is not between 0 and 1")
    if out is not None:
        refuse_occupied(out)
    with output(json_file) as result:
        from sparsae.evaluate.essential import essential_sparsity
        from sparsae.report.essential import essential_table, remark, verdict, write_essential
        from sparsae.train.progress import Display

        with contextlib.closing(Display(quiet=json_file == "-")) as display:
            found = essential_sparsity(
                model,
                data,
                shares,
                teacher=teacher,
                best=best,
                max_tokens=max_tokens,
                tolerance=tolerance,
                progress=display.stage,
            )
        result.update(encode(found))
        if out is not None:
            write_essential(out, found)
    if json_file == "-":
        return
    table = essential_table(found)
    show_table(table.title, table.columns, table.rows, table.names)
    typer.echo(verdict(found))
    if (left_out := remark(found)) is not None:
        typer.echo(left_out)
    if out is not None:
        typer.echo(f"written: {out / 'report.html'}, sparsity.json")
