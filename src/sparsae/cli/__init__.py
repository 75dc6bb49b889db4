"""The commands: arguments in, one call, a table or JSON out. Nothing else imports this module.

Whatever needs torch is imported inside the command that uses it, so that `--help`, a wrong setting and `--print-config`
answer at once. Commands of more than a call, and those below `bench` and `check`, have modules of their own. An
InputError becomes one line on standard error and exit code 2, as a wrong argument does.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, final

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

import sparsae
from sparsae.cli import experiments
from sparsae.cli.bench import bench
from sparsae.cli.cache import cache
from sparsae.cli.check import check
from sparsae.cli.listing import list_methods, list_presets, list_rules
from sparsae.cli.output import (
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_RANKS,
    Best,
    JsonFile,
    Run,
    Teacher,
    output,
    show_values,
)
from sparsae.cli.process import interruptible, open_closed_streams, without_noise
from sparsae.cli.schema import schema
from sparsae.cli.tasks import evaluate, finetune
from sparsae.cli.train import train
from sparsae.cli.watch import watch
from sparsae.config.complaints import explain
from sparsae.config.schema import MOST_GENERATED
from sparsae.errors import InputError, RanksError, require_utf8
from sparsae.experiments.directory import is_experiment
from sparsae.files import refuse_file, refuse_unwritable
from sparsae.registry import import_files
from sparsae.runs.claim import refuse_occupied
from sparsae.runs.directory import describe

# Typer has carried a click of its own since 0.26; this is the parent of its argument errors, whichever click that is.
_UsageError: Any = typer.BadParameter.__base__


@final
class _Commands(TyperGroup):
    """Tells of Ctrl-C, which Typer makes an exit code like that of a run that was saved and has said so."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("sparsae: interrupted", file=sys.stderr)
            raise


_on_terminal = bool(sys.stdout and sys.stdout.isatty())
app = typer.Typer(
    name="sparsae",
    cls=_Commands,
    help="Train language models that are sparse from the first step to the last.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if _on_terminal else None,
    # In a pipe nothing tells how wide lines may be, and at 80 characters the commands' own sentences are cut off.
    context_settings=None if _on_terminal else {"terminal_width": 132},
)
app.add_typer(bench, name="bench")
app.add_typer(check, name="check")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"sparsae {sparsae.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(train)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, max=MOST_GENERATED, metavar="N", help="Tokens to add.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="F", help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="N", help="Choose among so many tokens; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Fixes what is random.")] = 0,
    teacher: Teacher = False,
    best: Best = False,
) -> None:
    """Continue a text with a run's model."""
    if not math.isfinite(temperature):
        raise InputError(f"--temperature: must be a finite number, not {temperature}")
    from sparsae.evaluate.generation import generate_text

    text = generate_text(run, prompt, tokens, temperature, top_k, seed, teacher, best)
    typer.echo(prompt + text)
    if not text:
        typer.echo("the model ended the text at once: another --seed or a longer prompt may go on", err=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The directory of a run, or several.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page of several runs.", show_default=False)
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every figure as SVG and PDF there too.", show_default=False),
    ] = None,
) -> None:
    """Write the report.html of a run, or of an experiment, again; or one page of several runs."""
    _refuse_figures(figures)
    refuse_unwritable("--out", None if out is None else str(out))
    if len(runs) > 1:
        if out is None:
            raise InputError("--out: name the page of several runs, such as runs.html")
        if experiment := next(filter(is_experiment, runs), None):
            raise InputError(f"{experiment}: is an experiment, which has a page of its own: name runs")
        from sparsae.report.page import write_reports

        typer.echo(write_reports(runs, out, figures))
        _tell_figures(figures)
        return
    (run,) = runs
    if out is not None:
        raise InputError("--out: is for the page of several runs; that of one lies in its directory")
    if is_experiment(run):
        from sparsae.experiments.page import write_page

        typer.echo(write_page(run, figures))
        _tell_figures(figures)
        return
    from sparsae.report.page import write_report

    typer.echo(write_report(run, figures))
    _tell_figures(figures)


def _refuse_figures(folder: Path | None) -> None:
    """Older figures are written over; among files of another kind nobody would find them."""
    refuse_file("--figures", folder)
    if folder is not None and folder.is_dir():
        other = next((entry for entry in sorted(folder.iterdir()) if entry.suffix not in (".svg", ".pdf")), None)
        if other is not None:
            raise InputError(f"--figures: {folder} holds {other.name}, which is no figure: give a new directory")


def _tell_figures(folder: Path | None) -> None:
    if folder is not None:
        typer.echo(f"figures: {len(list(folder.glob('*.svg')))} as SVG and as PDF in {folder}", err=True)


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.", show_default=False)],
    teacher: Teacher = False,
    best: Best = False,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="dense: anything loads it, zeros are stored; sparse: import sparsae first; compact: few bytes; "
            "semi-structured: 2:4 for GPUs, as torch packs it; onnx: other runtimes.",
        ),
    ] = "dense",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a compact one (float32 changes nothing) or a semi-structured one.  (default: bfloat16)",
        ),
    ] = None,
) -> None:
    """Write a run's model for transformers, dense or sparse, for other runtimes, or in few bytes."""
    refuse_occupied(to)
    from sparsae.evaluate.export import export_run

    export_run(run, to, teacher, form, precision, best)
    typer.echo(to)


@app.command()
def info(run: Run, json_file: JsonFile = None) -> None:
    """What is known of a run: settings, progress and results."""
    refuse_unwritable("--json", json_file)
    with output(json_file) as result:
        result.update(describe(run))
    if json_file != "-":
        show_values(str(run), result)


for _command in (experiments.compare, experiments.ablate, experiments.sensitivity, experiments.transfer):
    app.command()(_command)
app.command()(watch)
app.command()(evaluate)
app.command()(finetune)
for _name, _listing in (("presets", list_presets), ("methods", list_methods), ("rules", list_rules)):
    app.command(_name)(_listing)
app.command()(cache)
app.command()(schema)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command (of `sys.argv`, unless given); the exit code is 0, 2 after a wrong input, 130 after Ctrl-C.

    It is 1 where this is one of several ranks and another one has ended, or they differ.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text that the terminal's encoding lacks is shown in escapes; standard error does so by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for argument in given:
            require_utf8("the command line", argument)
        import_files()
        with without_noise(), interruptible():
            code = app(args=given, prog_name="sparsae", standalone_mode=False)
    except InputError as error:
        message = str(error)
    except RanksError as error:
        print(f"sparsae: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_RANKS
    except _UsageError as error:
        message = _without_pydantic(error)
    except BrokenPipeError:  # whoever reads our output has had enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INPUT
    except OSError as error:
        place = f"{error.filename}: cannot be read or written: " if error.filename else ""
        message = f"{place}{error.strerror or error}"
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    else:
        return code if isinstance(code, int) else 0
    print(f"sparsae: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_INPUT


def _without_pydantic(error: Any) -> str:
    """What a wrong argument's error says; of a number that is none, which pydantic reads, as of any setting."""
    if not isinstance(error.__cause__, ValidationError) or error.param is None:
        return str(error.format_message())
    return explain(error.__cause__.errors(include_url=False)[0], (), {(): error.param.opts[0]})
