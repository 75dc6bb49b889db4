"""`sparsae train`: settings from all their places, then a run with its sample and its report, or what it would be."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsae.cli.forecasts import show_run
from sparsae.cli.listing import Preset, complete
from sparsae.cli.output import EXIT_INTERRUPTED, JsonFile, output
from sparsae.config.load import resolve
from sparsae.config.schema import Config
from sparsae.config.shipped import methods
from sparsae.config.text import annotated
from sparsae.core.record import encode
from sparsae.errors import DivergedError, InputError, TakenError
from sparsae.files import refuse_unwritable
from sparsae.runs.claim import refuse_occupied
from sparsae.runs.directory import RunDirectory
from sparsae.runs.lock import is_first_rank, launched_ranks, refuse_ranks
from sparsae.runs.recognized import is_pretrained


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
            metavar="RUN",
            help="Continue a run; takes no other settings but more --steps and --allow-change.",
            show_default=False,
        ),
    ] = None,
    allowed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="KEY",
            help="With --resume: the value of this setting in config.yaml was changed, and counts from now on.",
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
    best: Annotated[
        bool,
        typer.Option("--best", help="With --from: its checkpoint of the best validation (training.keep_best)."),
    ] = False,
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
    json_file = json_file if is_first_rank() else None
    refuse_unwritable("--json", json_file)
    if resume is not None:
        options: dict[str, object] = {
            "--from": source,
            "--best": best or None,
            "CONFIG": config,
            "--preset": preset,
            "--method": method,
            "--out": out,
            "--set": settings,
            "--seed": seed,
            "--sparsity": sparsity,
            "--print-config": print_config or None,
            "--dry-run": dry_run or None,
        }
        if given := [name for name, value in options.items() if value not in (None, [])]:
            other = " (another value goes into its config.yaml, with --allow-change KEY here)" if settings else ""
            raise InputError(f"--resume continues a run with its own settings: leave out {', '.join(given)}{other}")
        _resume(resume, steps, json_file, quiet, allowed or ())
        return
    if allowed:
        raise InputError("--allow-change: only a run that is resumed has settings that were changed: give --resume RUN")
    if best:
        if source is None:
            raise InputError("--best: only of what a run starts from there is a best checkpoint: give --from DIR")
        from sparsae.train.pretrained import at_best

        source, best = at_best(source)
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
        if out is not None:
            refuse_occupied(out, resolved)
        with output(json_file) as result:
            from sparsae.train.forecast import forecast

            result.update(forecast(resolved))
        if not quiet:
            show_run(result)
        return
    if out is not None:
        _start(resolved, out, source, best, json_file, quiet)
        return
    name = f"{resolved.preset}-{resolved.method}"
    while True:
        directory = _free_directory(name)
        try:
            _start(resolved, directory, source, best, json_file, quiet)
        except TakenError:  # by another process, since then
            if launched_ranks() > 1 or not directory.exists():
                raise
        else:
            return


def _start(
    config: Config, directory: Path, source: Path | None, best: bool, json_file: str | None, quiet: bool
) -> None:
    if is_first_rank():
        refuse_occupied(directory, config)
    with output(json_file) as result:
        from sparsae.train.run import start

        with _reporting(directory):
            result.update(start(config, directory, quiet, source, best))
        if is_first_rank():
            _finish(directory, result, quiet)
    _exit_if_stopped(result)


def _resume(run: Path, steps: int | None, json_file: str | None, quiet: bool, allowed: Sequence[str]) -> None:
    with output(json_file) as result:
        left = None if allowed else _left_to_write(run, steps)
        if left is None:
            from sparsae.train.run import resume

            with _reporting(run):
                left = resume(run, quiet, steps, allowed)
        result.update(left)
        if is_first_rank():
            _finish(run, result, quiet)
    _exit_if_stopped(result)


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
    if summary is None or not summary.finished:
        return None
    is_whole = [summary.steps] == [run.config().training.steps] == run.saved_steps()[-1:]
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
