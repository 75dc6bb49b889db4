"""The commands: arguments in, one call, a table or JSON out. Nothing else imports this module.

Whatever needs torch is imported inside the command that uses it, so that `--help`, a wrong setting and `--print-config`
answer at once. An InputError becomes one line on standard error and exit code 2, and so does a wrong argument.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import sparsae
from sparsae.config.load import annotated, methods, presets, resolve
from sparsae.errors import InputError
from sparsae.train.rundir import describe, refuse_occupied, to_json, write_atomically

# Typer has carried a click of its own since 0.26; this is the parent of its argument errors, whichever click that is.
_UsageError: Any = typer.BadParameter.__base__
_EXIT_INPUT, _EXIT_INTERRUPTED = 2, 130

app = typer.Typer(
    name="sparsae",
    help="Train language models that are sparse from the first step to the last.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
]
Teacher = Annotated[bool, typer.Option("--teacher", help="Use the teacher (the average) instead of the student.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"sparsae {sparsae.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings.", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(help=f"Model and run: {', '.join(presets())}.  (default: demo)")] = None,
    method: Annotated[str | None, typer.Option(help=f"Method: {', '.join(methods())}.  (default: sparsae)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run.  (default: runs/PRESET-METHOD-N)", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="The same as --set training.steps=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --set seed=N.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="The same as --set sparsity.sparsity=F.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue a run; takes no other settings.", show_default=False)
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting with its explanation and exit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show parameters, density, FLOPs, memory and time, and exit.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a model that is sparse from the first step to the last."""
    quiet = json_file == "-"
    _check_json(json_file)
    if resume is not None:
        options: dict[str, object] = {
            "CONFIG": config,
            "--preset": preset,
            "--method": method,
            "--out": out,
            "--set": settings,
        }
        options |= {"--steps": steps, "--seed": seed, "--sparsity": sparsity}
        options |= {"--print-config": print_config or None, "--dry-run": dry_run or None}
        given = [name for name, value in options.items() if value not in (None, [])]
        if given:
            raise InputError(f"--resume continues a run with its own settings: leave out {', '.join(given)}")
        with _output(json_file) as result:
            from sparsae.train.run import resume as continue_run

            result.update(continue_run(resume, quiet))
            _finish(resume, result, quiet)
        _exit_if_stopped(result)
        return
    short = {
        "--steps": ("training.steps", steps),
        "--seed": ("seed", seed),
        "--sparsity": ("sparsity.sparsity", sparsity),
    }
    resolved = resolve(
        config,
        preset,
        method,
        settings or [],
        options={option: (key, value) for option, (key, value) in short.items() if value is not None},
    )
    if print_config:
        if json_file is not None:
            raise InputError("--print-config writes YAML: leave out --json")
        typer.echo(annotated(resolved), nl=False)
        return
    if dry_run:
        with _output(json_file) as result:
            from sparsae.train.plan import plan

            result.update(plan(resolved))
        if not quiet:
            _show_plan(result)
        return
    directory = out or _free_directory(f"{resolved.preset}-{resolved.method}")
    refuse_occupied(directory)
    with _output(json_file) as result:
        from sparsae.train.run import start

        result.update(start(resolved, directory, quiet))
        _finish(directory, result, quiet)
    _exit_if_stopped(result)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Text: a path, a glob, stdlib or hf:NAME.  (default: the run's held-out text)"
        ),
    ] = None,
    teacher: Teacher = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Loss, perplexity and bits per byte of a run's model on a text."""
    _check_json(json_file)
    with _output(json_file) as result:
        from sparsae.evaluate.perplexity import evaluate_run

        result.update(evaluate_run(run, data, teacher, max_tokens))
    if json_file != "-":
        _show_values(f"{run} on {data or 'its held-out text'}", result)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="F", help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="N", help="Choose among so many tokens; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Fixes what is random.")] = 0,
    teacher: Teacher = False,
) -> None:
    """Continue a text with a run's model."""
    if not math.isfinite(temperature):
        raise InputError(f"--temperature: must be a finite number, not {temperature}")
    from sparsae.evaluate.generation import generate_text

    typer.echo(generate_text(run, prompt, tokens, temperature, top_k, seed, teacher))


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html again."""
    from sparsae.report.page import write_report

    typer.echo(write_report(run))


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.", show_default=False)],
    teacher: Teacher = False,
) -> None:
    """Write a run's model as a Hugging Face directory, with the topology beside it."""
    refuse_occupied(to)
    from sparsae.evaluate.export import export_run

    export_run(run, to, teacher)
    typer.echo(to)


@app.command()
def info(run: Run, json_file: JsonFile = None) -> None:
    """What is known of a run: settings, progress and results."""
    _check_json(json_file)
    with _output(json_file) as result:
        result.update(describe(run))
    if json_file != "-":
        _show_values(str(run), result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command (of `sys.argv`, unless given); the exit code is 0, 2 after a wrong input, 130 after Ctrl-C."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, prog_name="sparsae", standalone_mode=False)
    except InputError as error:
        message = str(error)
    except _UsageError as error:
        message = error.format_message()
    except OSError as error:
        message = f"{error.filename or 'a file'}: cannot be read or written: {error.strerror or error}"
    except (KeyboardInterrupt, typer.Abort):
        return _EXIT_INTERRUPTED
    else:
        return code if isinstance(code, int) else 0
    print(f"sparsae: error: {' '.join(message.split())}", file=sys.stderr)
    return _EXIT_INPUT


def _finish(run: Path, summary: Mapping[str, Any], quiet: bool) -> None:
    """The sample and the report of a run; one that was stopped gets its report only."""
    from sparsae.report.page import write_report

    if summary["finished"]:
        from sparsae.evaluate.generation import write_sample

        write_sample(run)
    page = write_report(run)
    if not quiet:
        typer.echo(f"report: {page}", err=True)


def _exit_if_stopped(summary: Mapping[str, Any]) -> None:
    if not summary["finished"]:
        raise typer.Exit(_EXIT_INTERRUPTED)


def _free_directory(name: str) -> Path:
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{name}-{n}").exists())


def _check_json(file: str | None) -> None:
    """Refuses, before any work, a place where the result could not be written."""
    if file is None or file == "-":
        return
    folder = Path(file).parent
    if Path(file).is_dir():
        raise InputError(f"--json: {file} is a directory; give a file, or - for standard output")
    if not folder.is_dir():
        raise InputError(f"--json: no directory {folder}; give a file in one that exists, or - for standard output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--json: no permission to write in {folder}; give a file elsewhere, or - for standard output")


@contextlib.contextmanager
def _output(json_file: str | None) -> Iterator[dict[str, Any]]:
    """A dictionary to fill, written as JSON at the end; meanwhile standard output carries nothing else."""
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr) if json_file == "-" else contextlib.nullcontext():
        yield result
    if json_file == "-":
        typer.echo(to_json(result, indent=2))
    elif json_file is not None:
        write_atomically(Path(json_file), to_json(result, indent=2) + "\n")


def _show_plan(plan: Mapping[str, Any]) -> None:
    """Layers, then what the run costs beside the dense model (by part where the plan has parts), then the rest."""
    layers = [
        (layer["name"], layer["out"], layer["in"], _readable(layer["nnz"]), f"{layer['density']:.4f}")
        for layer in plan["layers"]
    ]
    _show_table("Sparsified layers", ("layer", "out", "in", "nnz", "density"), layers)
    costs = []
    for name, here, dense in (
        ("parameters", "parameters", "parameters_dense"),
        ("training FLOPs", "train_flops", "train_flops_dense_equivalent"),
        ("model state, bytes", "state_bytes", "state_bytes_dense_equivalent"),
    ):
        ours, theirs = _by_part(plan[here]), _by_part(plan[dense])
        for part in dict.fromkeys((*ours, *theirs)):
            a, b = ours.get(part, 0), theirs.get(part)
            ratio = f"{a / b:.3f}" if b else "-"
            costs.append((f"{name}: {part}" if part else name, _readable(a), _readable(b), ratio))
    _show_table("Cost", ("", "here", "dense", "ratio"), costs)
    shown = ("steps", "tokens", "train_flops_per_step", "expected_seconds")
    _show_values("Run", {key: plan[key] for key in shown})


def _by_part(amount: Any) -> dict[str, Any]:
    """{"": total} and, where the amount is given by part, each part after it."""
    return {"": sum(amount.values()), **amount} if isinstance(amount, Mapping) else {"": amount}


def _show_values(title: str, values: Mapping[str, Any]) -> None:
    rows: list[tuple[str, ...]] = []
    for key, value in values.items():
        for name, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            rows.append((f"{key}.{name}" if name else key, _readable(part)))
    _show_table(title, ("", ""), rows)


def _readable(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and abs(value) >= 1e12:
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A rich table on a terminal, aligned plain lines elsewhere."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, show_header=any(columns), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index and any(columns) else "left")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = ([list(columns)] if any(columns) else []) + cells
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    numeric = any(columns)  # every table with a header has numbers after its first column
    typer.echo(title)
    for line in lines:
        padded = [
            cell.rjust(width) if index and numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo(("  " + "  ".join(padded)).rstrip())
