"""The commands: arguments in, one call, a table or JSON out. Nothing else imports this module.

Whatever needs torch is imported inside the command that uses it, so that `--help`, a wrong setting and `--print-config`
answer at once. Commands below `bench` and `check`, those that run experiments and those that say what a model is worth
have modules of their own. An InputError becomes one line on standard error and exit code 2, as a wrong argument does.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from sparsae.cli.listing import Preset, complete, list_methods, list_presets, list_rules
from sparsae.cli.output import (
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_RANKS,
    JsonFile,
    Run,
    Teacher,
    output,
    readable,
    show_table,
    show_values,
)
from sparsae.cli.schema import schema
from sparsae.cli.tasks import evaluate, finetune
from sparsae.cli.watch import watch
from sparsae.config.complaints import explain
from sparsae.config.load import annotated, methods, resolve
from sparsae.config.schema import MOST_GENERATED
from sparsae.core.record import encode
from sparsae.errors import DivergedError, InputError, RanksError, require_utf8
from sparsae.experiments.directory import is_experiment
from sparsae.files import refuse_unwritable
from sparsae.registry import import_files
from sparsae.runs.claim import refuse_occupied
from sparsae.runs.directory import RunDirectory, describe, is_pretrained
from sparsae.runs.lock import is_first_rank, launched_ranks, refuse_ranks

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


app = typer.Typer(
    name="sparsae",
    cls=_Commands,
    help="Train language models that are sparse from the first step to the last.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
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


def _among_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """A command that the ranks of a launcher carry out together, where one started this program."""

    @functools.wraps(command)
    def carried_out(*args: Any, **kwargs: Any) -> None:
        if launched_ranks() == 1:
            return command(*args, **kwargs)
        from sparsae.train.joining import joined

        ended: typer.Exit | None = None
        with joined():
            try:
                command(*args, **kwargs)
            except typer.Exit as code:  # all of them have stopped
                ended = code
        if ended is not None:
            raise ended
        return None

    return carried_out


@app.command()
@_among_ranks
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings.", show_default=False)] = None,
    preset: Preset = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"Method: {', '.join(methods())}.  (default: sparsae)", autocompletion=complete(methods)),
    ] = None,
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
        Path | None,
        typer.Option(
            metavar="RUN", help="Continue a run; takes no other settings but more --steps.", show_default=False
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Start from the weights and settings of a run, or of a directory of transformers'.",
            show_default=False,
        ),
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
    if print_config or dry_run:
        refuse_ranks("--print-config" if print_config else "--dry-run")
    is_first = is_first_rank()
    json_file = json_file if is_first else None
    refuse_unwritable("--json", json_file)
    if resume is not None:
        options: dict[str, object] = {
            "--from": source,
            "CONFIG": config,
            "--preset": preset,
            "--method": method,
            "--out": out,
            "--set": settings,
        }
        options |= {"--seed": seed, "--sparsity": sparsity}
        options |= {"--print-config": print_config or None, "--dry-run": dry_run or None}
        given = [name for name, value in options.items() if value not in (None, [])]
        if given:
            raise InputError(f"--resume continues a run with its own settings: leave out {', '.join(given)}")
        with output(json_file) as result:
            left = _left_to_write(resume, steps)
            if left is None:
                from sparsae.train.run import resume as continue_run

                with _reporting(resume):
                    left = continue_run(resume, quiet, steps)
            result.update(left)
            if is_first:
                _finish(resume, result, quiet)
        _exit_if_stopped(result)
        return
    short = {
        "--steps": ("training.steps", steps),
        "--seed": ("seed", seed),
        "--sparsity": ("sparsity.sparsity", sparsity),
    }
    pretrained = source is not None and is_pretrained(source)
    resolved = resolve(
        _settings_file(source) if source and not pretrained and not config and not preset else config,
        preset,
        method,
        settings or [],
        options={option: (key, value) for option, (key, value) in short.items() if value is not None},
        counted_by="--dry-run" if dry_run else None,
        on_idle=_refuse_idle,
        trees=_settings_of(source) if source and pretrained else [],
    )
    if print_config:
        if json_file is not None:
            raise InputError("--print-config writes YAML: leave out --json")
        typer.echo(annotated(resolved), nl=False)
        return
    if dry_run:
        with output(json_file) as result:
            from sparsae.train.forecast import forecast

            result.update(forecast(resolved))
        if not quiet:
            _show_forecast(result)
        return
    directory = out or _free_directory(f"{resolved.preset}-{resolved.method}")
    if is_first:
        refuse_occupied(directory, resolved)
    with output(json_file) as result:
        from sparsae.train.run import start

        with _reporting(directory):
            result.update(start(resolved, directory, quiet, source))
        if is_first:
            _finish(directory, result, quiet)
    _exit_if_stopped(result)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, max=MOST_GENERATED, metavar="N", help="Tokens to add.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="F", help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="N", help="Choose among so many tokens; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Fixes what is random.")] = 0,
    teacher: Teacher = False,
) -> None:
    """Continue a text with a run's model."""
    if not math.isfinite(temperature):
        raise InputError(f"--temperature: must be a finite number, not {temperature}")
    from sparsae.evaluate.generation import generate_text

    text = generate_text(run, prompt, tokens, temperature, top_k, seed, teacher)
    typer.echo(prompt + text)
    if not text:
        typer.echo("the model ended the text at once: another --seed or a longer prompt may go on", err=True)


@app.command()
def report(run: Run) -> None:
    """Write the report.html of a run, or of an experiment, again."""
    if is_experiment(run):
        from sparsae.experiments.page import write_page

        typer.echo(write_page(run))
        return
    from sparsae.report.page import write_report

    typer.echo(write_report(run))


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.", show_default=False)],
    teacher: Teacher = False,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="dense: anything loads it, zeros are stored; sparse: import sparsae first; compact: few bytes; "
            "onnx: other runtimes.",
        ),
    ] = "dense",
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a compact one: float32 changes nothing.  (default: bfloat16)"),
    ] = None,
) -> None:
    """Write a run's model for transformers, dense or sparse, for other runtimes, or in few bytes."""
    refuse_occupied(to)
    from sparsae.evaluate.export import export_run

    export_run(run, to, teacher, form, precision)
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text that the terminal's encoding lacks is shown in escapes; standard error does so by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for argument in given:
            require_utf8("the command line", argument)
        import_files()
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


def _finish(run: Path, summary: Mapping[str, Any], quiet: bool) -> None:
    """The sample and the report of a run; one that was stopped gets its report only."""
    from sparsae.report.page import write_report

    if summary["finished"]:
        from sparsae.evaluate.generation import write_sample

        write_sample(run)
    page = write_report(run)
    if not quiet:
        typer.echo(f"report: {page}", err=True)


@contextlib.contextmanager
def _reporting(run: Path) -> Iterator[None]:
    """A run that diverges inside leaves a report too, and its error is raised again."""
    try:
        yield
    except DivergedError:
        if not is_first_rank():
            raise
        from sparsae.report.page import write_report

        # Nothing can be shown of a run that diverged before it wrote a row: why it ended is all that there is to tell.
        with contextlib.suppress(InputError):
            typer.echo(f"report: {write_report(run)}", err=True)
        raise


def _left_to_write(path: Path, steps: int | None) -> dict[str, Any] | None:
    """The summary of a finished run that was cut off before its sample and its report were written; else None."""
    run = RunDirectory(path)
    if steps is not None or (run.sample.is_file() and run.report.is_file()):
        return None
    summary = run.read_summary()
    is_whole = summary is not None and summary.finished and summary.steps == run.config().training.steps
    return encode(summary) if is_whole else None


def _refuse_idle(lines: Mapping[str, str]) -> None:
    if lines:
        raise InputError(next(iter(lines.values())))


def _settings_file(source: Path) -> Path:
    """A run's config.yaml, which is what the run began with."""
    run = RunDirectory.open(source)
    run.config()
    return run.config_file


def _settings_of(source: Path) -> list[tuple[Mapping[str, Any], str]]:
    """What a directory of transformers' says of its model."""
    from sparsae.train.pretrained import pretrained_settings

    return [(pretrained_settings(source), f"--from {source}")]


def _exit_if_stopped(summary: Mapping[str, Any]) -> None:
    if not summary["finished"]:
        raise typer.Exit(EXIT_INTERRUPTED)


def _free_directory(name: str) -> Path:
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{name}-{n}").exists())


def _show_forecast(found: Mapping[str, Any]) -> None:
    """Layers, then what the run costs beside the dense model (by part where the forecast has parts), then the rest."""
    layers, columns = [], ["layer", "out", "in", "nnz", "density"]
    has_factors = any(layer["density_factor"] != 1.0 for layer in found["layers"])
    for layer in found["layers"]:
        row = [layer["name"], layer["out"], layer["in"], readable(layer["nnz"]), f"{layer['density']:.4f}"]
        at_bound = " (at a bound)" if layer["density_cut"] else ""
        layers.append([*row, f"{layer['density_factor']:g}{at_bound}"] if has_factors else row)
    show_table("Sparsified layers", [*columns, "factor"] if has_factors else columns, layers)
    if found["density_steps"]:
        rows = [[each["step"], readable(each["nnz"]), f"{each['density']:.4f}"] for each in found["density_steps"]]
        show_table("Density over the run", ["after step", "nnz", "density"], rows)
    costs = []
    for name, here, dense in (
        ("parameters", "parameters", "parameters_dense"),
        ("training FLOPs", "train_flops", "train_flops_dense_equivalent"),
        ("model state, bytes", "state_bytes", "state_bytes_dense_equivalent"),
    ):
        ours, theirs = _by_part(found[here]), _by_part(found[dense])
        for part in dict.fromkeys((*ours, *theirs)):
            a, b = ours.get(part, 0), theirs.get(part)
            ratio = f"{a / b:.3f}" if b else "-"
            costs.append((f"{name}: {part}" if part else name, readable(a), readable(b), ratio))
    show_table("Cost", ("", "here", "dense", "ratio"), costs)
    shown = ("steps", "tokens", "train_flops_per_step", "expected_seconds")
    show_values("Run", {key: found[key] for key in shown})


def _by_part(amount: Any) -> dict[str, Any]:
    """{"": total} and, where the amount is given by part, each part after it."""
    return {"": sum(amount.values()), **amount} if isinstance(amount, Mapping) else {"": amount}
