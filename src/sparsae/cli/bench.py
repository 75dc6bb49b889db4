"""`sparsae bench ...`: options in, rows out: shown as they come, summed up, and written as JSON and SVG.

Torch is imported inside the commands, so that `--help` and a wrong option answer at once. An option that takes several
values takes them separated by commas, or is repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from sparsae.cli.output import show_table
from sparsae.config.shipped import methods, presets
from sparsae.errors import InputError
from sparsae.files import refuse_unwritable, to_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from rich.console import Console

    from sparsae.bench.rows import Column, Row

T = TypeVar("T")
_DTYPES = ("float32", "bfloat16", "float16")

bench = typer.Typer()

Several = list[str] | None
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.  (default: torch's choice)")]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the rows as JSON; - for standard output; X.jsonl: add each."),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")]
PlotFile = Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Draw the rows as SVG.")]


class _Measurement(Protocol):
    def __len__(self) -> int: ...

    def measure(self) -> Iterator[list[Row]]: ...


@bench.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Measure kernels, training steps, topology updates and the machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def kernels(
    shapes: Annotated[
        Several, typer.Option(metavar="OUTxIN", help="Layers.  (default: 768x768,3072x768,768x3072,4096x1024)")
    ] = None,
    tokens: Annotated[Several, typer.Option(metavar="N", help="Tokens.  (default: 2048)")] = None,
    sparsities: Annotated[
        Several, typer.Option(metavar="F", help="Shares of zeros.  (default: 0.8,0.9,0.95,0.99)")
    ] = None,
    units: Annotated[Several, typer.Option(metavar="OxI", help="Single weights or blocks.  (default: 1x1,4x4)")] = None,
    dtypes: Annotated[
        Several, typer.Option(metavar="NAME", help="float32, bfloat16, float16.  (default: float32)")
    ] = None,
    threads: Annotated[Several, typer.Option(metavar="N", help="Numbers of CPU threads.  (default: 1)")] = None,
    backends: Annotated[
        Several, typer.Option(metavar="NAME", help="Ours and other libraries'.  (default: all but auto)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Measurements of which the median counts.")] = 5,
    device: Device = "cpu",
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Sparse layers beside F.linear and other libraries: forward, and forward with backward, in turns.

    The ratio is that of wall times, on a GPU of the GPU's, above 1 faster than dense; CPU ratio is that of CPU times.
    """
    layers = _several("--shapes", shapes, "768x768,3072x768,768x3072,4096x1024", _pair)
    counts = _several("--tokens", tokens, "2048", _count)
    shares = _several("--sparsities", sparsities, "0.8,0.9,0.95,0.99", _share)
    blocks = _several("--units", units, "1x1,4x4", _pair)
    elements = _several("--dtypes", dtypes, "float32", _dtype)
    cores = _several("--threads", threads, "1", _count)
    _require_places(json_file, plot_file)
    from sparsae.bench import kernels as module
    from sparsae.bench import plots

    names = _several("--backends", backends, ",".join(module.CONTENDERS[1:]), str)
    measured = module.Kernels(layers, counts, shares, blocks, elements, cores, names, rounds, _device(device))
    console = _console(json_file)
    for line in measured.left_out():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    rows = _measure(console, "Layers beside F.linear", module.COLUMNS, measured, json_file)
    _show(console, "Geometric means over the layers", module.MEANS, module.means(rows), names=7)
    _write(rows, json_file, plot_file, plots.kernels)


@bench.command()
def step(
    preset: Annotated[str, typer.Option(help=f"Model: {', '.join(presets())}.")] = "gpt-25m",
    method: Annotated[str, typer.Option(help=f"Whose updates: {', '.join(methods())}.")] = "sparsae",
    settings: Annotated[
        Several, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    sparsity: Annotated[Several, typer.Option(metavar="F", help="Shares of zeros.  (default: 0.9)")] = None,
    backends: Annotated[Several, typer.Option(metavar="NAME", help="Backends of ours.  (default: auto)")] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of which the median counts.")] = 5,
    decode: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also decode N tokens one at a time, three times.")
    ] = 0,
    runtimes: Annotated[
        Several,
        typer.Option(
            metavar="NAME", help="Also decode the dense model in them: onnxruntime, openvino.  (default: none)"
        ),
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher/--no-teacher", help="With the teacher of the settings.")] = False,
    device: Device = "cpu",
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory too, a process for each model.")
    ] = True,
    stock: Annotated[
        bool, typer.Option("--stock/--no-stock", help="And the dense model as transformers and torch train it.")
    ] = True,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Whole training steps of a model on random tokens, dense beside sparse, in turns; what an update adds to one.

    On a GPU both are compiled (training.compile) and in bfloat16, where --set does not say otherwise.
    """
    shares = _several("--sparsity", sparsity, "0.9", _share)
    _require_places(json_file, plot_file)
    from sparsae.bench import plots
    from sparsae.bench import step as module

    names = _several("--backends", backends, "auto", str)
    where = _device(device)
    others = _several("--runtimes", runtimes, "", str) if runtimes else []
    measured = module.Steps(
        *(preset, method, settings or [], shares, names, steps, decode, threads, memory),
        device=where,
        teacher=teacher,
        runtimes=others,
        stock=stock,
    )
    columns = module.COLUMNS if where.type == "cpu" else (*module.COLUMNS, *module.UTILIZATION)
    rows = _measure(_console(json_file), f"Training steps of {preset}", columns, measured, json_file)
    _write(rows, json_file, plot_file, plots.steps)


@bench.command()
def memory(
    preset: Annotated[str, typer.Option(help=f"Model: {', '.join(presets())}.")] = "gpt-25m",
    method: Annotated[str, typer.Option(help=f"Method: {', '.join(methods())}.")] = "static",
    settings: Annotated[
        Several, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    sparsity: Annotated[Several, typer.Option(metavar="F", help="Shares of zeros.  (default: 0.9)")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes of parameters, optimizer and teacher, and the peak of two steps, sparse beside dense.

    A teacher counts where the method, or --set teacher.enabled=true, has one: in both models.
    """
    shares = _several("--sparsity", sparsity, "0.9", _share)
    _require_places(json_file, None)
    from sparsae.bench import state as module

    measured = module.States(preset, method, settings or [], shares, threads, _device(device))
    rows = _measure(_console(json_file), f"What training of {preset} holds", module.COLUMNS, measured, json_file)
    _write(rows, json_file)


@bench.command()
def topology(
    widths: Annotated[Several, typer.Option(metavar="N", help="Square layers.  (default: 2048 to 16384)")] = None,
    sparsities: Annotated[
        Several, typer.Option(metavar="F", help="Shares of zeros.  (default: 0.9,0.99,0.999)")
    ] = None,
    unit: Annotated[str, typer.Option(metavar="OxI", help="Single weights or blocks.")] = "1x1",
    updates: Annotated[Several, typer.Option(metavar="NAME", help="Kinds of update.  (default: all)")] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="Backend of ours.")] = "auto",
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the gradients at sampled units.")] = 512,
    share: Annotated[float, typer.Option(metavar="F", help="Share of the active units that are dropped.")] = 0.3,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Updates of which the median counts.")] = 3,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """One update of a layer's topology by its parts, against the number of active weights."""
    sizes = _several("--widths", widths, "2048,4096,8192,16384", _count)
    shares = _several("--sparsities", sparsities, "0.9,0.99,0.999", _share)
    block, moved = _one("--unit", unit, _pair), _one("--share", str(share), _share)
    _require_places(json_file, plot_file)
    from sparsae.bench import plots
    from sparsae.bench import topology as module

    kinds = _several("--updates", updates, ",".join(module.UPDATES), str)
    measured = module.Updates(sizes, shares, block, kinds, backend, tokens, moved, rounds, threads or _torch_threads())
    console = _console(json_file)
    rows = _measure(console, "Topology updates, ms by part", module.COLUMNS, measured, json_file)
    _show(console, "Growth of the time with nnz (1: linear)", module.SLOPES, module.slopes(rows), names=5)
    _write(rows, json_file, plot_file, plots.topology)


@bench.command()
def roofline(
    threads: Annotated[Several, typer.Option(metavar="N", help="Numbers of threads.  (default: 1 and all)")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, metavar="F", help="Time for each measurement.")] = 1.0,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """What the machine can do: multiply-adds in registers, and bytes through memory."""
    given = _several("--threads", threads, "1", _count) if threads else None
    _require_places(json_file, plot_file)
    from sparsae.bench import plots
    from sparsae.bench import roofline as module

    measured = module.Roofline(given or sorted({1, _torch_threads()}), seconds)
    rows = _measure(_console(json_file), "Roofline", module.COLUMNS, measured, json_file)
    _write(rows, json_file, plot_file, plots.roofline)


def _measure(
    console: Console, title: str, columns: Sequence[Column], measured: _Measurement, json_file: str | None
) -> list[Row]:
    from sparsae.bench.rows import Sheet

    rows: list[Row] = []
    with Sheet(console, title, columns, len(measured)) as sheet:
        for case in measured.measure():
            sheet.add(case)
            rows += case
            if _adds(json_file):
                with Path(str(json_file)).open("a", encoding="utf-8") as file:
                    file.writelines(to_json(row) + "\n" for row in case)
    return rows


def _show(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Row], names: int) -> None:
    """Rows that are all there; names: of how many columns a row is called by."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    show_table(title, [column.title for column in columns], cells, names, console.file)


def _adds(json_file: str | None) -> bool:
    """Whether rows are added to a file one by one, as they are measured, so that a measurement may be cut short."""
    return json_file is not None and json_file.endswith(".jsonl")


def _console(json_file: str | None) -> Console:
    from rich.console import Console

    return Console(stderr=json_file == "-")


def _require_places(json_file: str | None, plot_file: str | None) -> None:
    refuse_unwritable("--json", json_file)
    if plot_file == "-":
        raise InputError("--plot: give a file; standard output takes JSON only (--json -)")
    refuse_unwritable("--plot", plot_file)


def _write(
    rows: Sequence[Row],
    json_file: str | None,
    plot_file: str | None = None,
    draw: Callable[[Sequence[Row]], str] | None = None,
) -> None:
    if json_file == "-":
        sys.stdout.write(to_json(rows, indent=1) + "\n")
    elif json_file is not None and not _adds(json_file):
        write_atomically(Path(json_file), to_json(rows, indent=1) + "\n")
    if plot_file is not None and draw is not None:
        write_atomically(Path(plot_file), draw(rows))


def _several(option: str, given: Several, default: str, convert: Callable[[str], T]) -> list[T]:
    """The values of an option, each once, in their order. Raises InputError for one that is none."""
    words = [word.strip() for text in given or [default] for word in text.split(",")]
    return list(dict.fromkeys(_one(option, word, convert) for word in words))


def _one(option: str, word: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(word)
    except ValueError as error:
        raise InputError(f"{option}: '{word}' {error}") from None


def _pair(word: str) -> tuple[int, int]:
    parts = word.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("is not of the form 768x768: two whole numbers, at least 1")
    return int(parts[0]), int(parts[1])


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ValueError("is not a whole number, at least 1")
    return int(word)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise ValueError("is not a number from 0 to below 1")
    return value


def _dtype(word: str) -> str:
    if word not in _DTYPES:
        raise ValueError(f"is not one of {', '.join(_DTYPES)}")
    return word


def _device(name: str) -> torch.device:
    from sparsae.train.model import choose_device

    return choose_device(name, "--device")


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()
