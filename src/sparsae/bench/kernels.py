"""Sparse layers beside `F.linear` and beside other libraries, through autograd, in one run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean

import torch
from torch import Tensor, nn

from sparsae.bench.clock import CPU, Phases, Timing, interleaved, using_threads
from sparsae.bench.rivals import RIVALS
from sparsae.bench.roofline import limits
from sparsae.bench.rows import Column, Row, device_name, groups
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology, grid_size
from sparsae.errors import InputError
from sparsae.kernels.registry import backend_named, backend_names
from sparsae.nn.linear import SparseLinear
from sparsae.train.memory import keep_freed_memory

log = logging.getLogger(__name__)

FORWARD, BOTH = "forward", "forward+backward"
_PEAK_SECONDS = 0.2

COLUMNS = (
    Column("backend", "backend", width=10),
    Column("unit", "unit", width=5),
    Column("layer", lambda row: f"{row['out']}x{row['in']}", width=11),
    Column("tokens", "tokens", width=6),
    Column("sparsity", "sparsity", "g"),
    Column("dtype", "dtype"),
    Column("threads", "threads", width=7),
    Column("pass", "pass", width=16),
    Column("ms", lambda row: 1e3 * row["seconds"], ".2f"),
    Column("dense ms", lambda row: 1e3 * row["dense_seconds"], ".2f"),
    Column("ratio", "ratio", ".2f", 6),
    Column("CPU ratio", "cpu_ratio", ".2f", 9),
    Column("backward", "backward_ratio", ".2f"),
    Column("of peak", "peak_share", ".0%", 7),
    Column("dense", "dense_peak_share", ".0%", 6),
)
MEANS = (
    Column("backend", "backend", width=10),
    Column("unit", "unit", width=5),
    Column("tokens", "tokens", width=6),
    Column("sparsity", "sparsity", "g"),
    Column("dtype", "dtype"),
    Column("threads", "threads", width=7),
    Column("pass", "pass", width=16),
    Column("ratio", "ratio", ".2f", 6),
    Column("CPU ratio", "cpu_ratio", ".2f", 9),
    Column("of peak", "peak_share", ".0%", 7),
    Column("scaling", "scaling", ".2f", 7),
    Column("dense's", "dense_scaling", ".2f", 7),
)


@dataclass(frozen=True)
class Kernels:
    """What is measured: every combination. shapes: (out, in). units: (b_out, b_in). backends: ours, and rivals'."""

    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    sparsities: Sequence[float]
    units: Sequence[tuple[int, int]]
    dtypes: Sequence[str]
    threads: Sequence[int]
    backends: Sequence[str]
    rounds: int
    device: torch.device = CPU

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in CONTENDERS:
                raise InputError(f"--backends: no '{name}'; use {', '.join(CONTENDERS)}")
        for unit, shape in product(self.units, self.shapes):
            try:
                grid_size(shape, unit)
            except ValueError as error:
                raise InputError(f"--units, --shapes: {error}") from None
        if not any(self.contenders(unit, dtype) for unit in self.units for dtype in self.dtypes):
            raise InputError(f"nothing to measure: {'; '.join(self.left_out())}")

    def __len__(self) -> int:
        return len(list(self._cases()))

    def contenders(self, unit: tuple[int, int], dtype: str) -> list[str]:
        """The backends that are here and serve such layers."""
        return [name for name in self.backends if _refusal(name, unit, dtype, self.device) is None]

    def left_out(self) -> list[str]:
        """One line for each backend that is not here, or does not serve some of the units and dtypes."""
        lines = []
        for name in self.backends:
            absence = RIVALS[name].absence(self.device) if name in RIVALS else None
            if absence is not None:
                lines.append(f"{name}: {absence}")
                continue
            for unit, dtype in product(self.units, self.dtypes):
                if (reason := _refusal(name, unit, dtype, self.device)) is not None:
                    lines.append(f"{name}: left out for {unit[0]}x{unit[1]} in {dtype}: {reason}")
        return lines

    def measure(self) -> Iterator[list[Row]]:
        """The rows of one case after the other: one a pass and backend."""
        keep_freed_memory(self.device)  # as a training run does
        peaks: dict[int, float | None] = {}
        found = limits(self.device)
        for threads, dtype, tokens, unit, sparsity, shape in self._cases():
            with using_threads(threads):
                if threads not in peaks:
                    peaks[threads] = None if isinstance(found, str) else found.flops(threads, _PEAK_SECONDS)
                yield self._rows(threads, dtype, tokens, unit, sparsity, shape, peaks[threads])

    def _cases(self) -> Iterator[tuple[int, str, int, tuple[int, int], float, tuple[int, int]]]:
        for case in product(self.threads, self.dtypes, self.tokens, self.units, self.sparsities, self.shapes):
            if self.contenders(case[3], case[1]):
                yield case

    def _rows(
        self,
        threads: int,
        dtype: str,
        tokens: int,
        unit: tuple[int, int],
        sparsity: float,
        shape: tuple[int, int],
        peak: float | None,
    ) -> list[Row]:
        rng = generator(0, "bench")
        count = max(1, round((1 - sparsity) * grid_size(shape, unit)))
        topology = Topology.random(shape, count, rng, unit)
        element: torch.dtype = getattr(torch, dtype)
        topology = topology.to(self.device)
        values = self._random(topology.values_shape, element, rng)
        names = [name for name in self.contenders(unit, dtype) if _has(name, sparsity)]
        layers = {}
        for name in names:
            with _left_out_where_it_fails(name, self.device):
                layers[name] = layer_of(name, topology, values)
        dense = nn.Linear(shape[1], shape[0], dtype=element, device=self.device)
        x_TI = self._random((tokens, shape[1]), element, rng)
        dy_TO = self._random((tokens, shape[0]), element, rng)
        case: Row = {
            "unit": f"{unit[0]}x{unit[1]}",
            "out": shape[0],
            "in": shape[1],
            "tokens": tokens,
            "sparsity": sparsity,
            "dtype": dtype,
            "threads": threads,
            "device": device_name(self.device),
        }
        rows = []
        for which, products in ((FORWARD, 1), (BOTH, 3)):
            entered = [name for name in layers if which == FORWARD or name not in RIVALS or RIVALS[name].trains]
            work = {name: _work(layers[name], x_TI, dy_TO, which) for name in entered}
            for name, phases in list(work.items()):
                del work[name]
                with _left_out_where_it_fails(name, self.device):
                    for part in phases.values():
                        part()
                    work[name] = phases
            contenders = [_work(dense, x_TI, dy_TO, which), *work.values()]
            baseline, *timings = interleaved(contenders, self.rounds, threads, device=self.device)
            flops = 2.0 * products * tokens
            for name, timing in zip(work, timings, strict=True):
                row: Row = {"backend": name, **case, "pass": which} | _compared(timing, baseline)
                if peak is not None:
                    row["peak_share"] = flops * topology.nnz / timing.seconds / peak
                    row["dense_peak_share"] = flops * shape[0] * shape[1] / baseline.seconds / peak
                rows.append(row)
        return rows

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu").to(self.device, dtype)


# Every name that --backends takes: ours (auto chooses among them), and the other libraries'.
CONTENDERS = ("auto", *backend_names(), *RIVALS)


def layer_of(name: str, topology: Topology, values: Tensor) -> nn.Module:
    """A layer of ours or of a rival, with a bias of zeros."""
    bias_O = torch.zeros(topology.shape[0], dtype=values.dtype, device=values.device)
    if name in RIVALS:
        return RIVALS[name].layer(topology, values, bias_O)
    return SparseLinear(topology, values, bias_O, backend=name)


def means(rows: Sequence[Row]) -> list[Row]:
    """Geometric means over the layers, and how far the case with the fewest threads is sped up by more of them."""
    keys = ("backend", "unit", "tokens", "sparsity", "dtype", "threads", "pass")
    found = []
    for values, group in groups(rows, keys).items():
        mean = dict(zip(keys, values, strict=True))
        for key in ("seconds", "dense_seconds", "ratio", "cpu_ratio", "peak_share", "dense_peak_share"):
            if all(row.get(key) is not None for row in group):
                mean[key] = geometric_mean(row[key] for row in group)
        found.append(mean)
    for same in groups(found, [key for key in keys if key != "threads"]).values():
        fewest = min(same, key=lambda mean: mean["threads"])
        for mean in same:
            if mean is not fewest:
                mean["scaling"] = fewest["seconds"] / mean["seconds"]
                mean["dense_scaling"] = fewest["dense_seconds"] / mean["dense_seconds"]
    return found


def _has(name: str, sparsity: float) -> bool:
    """Whether a contender has such a sparsity."""
    return name not in RIVALS or RIVALS[name].sparsity in (None, sparsity)


def _refusal(name: str, unit: tuple[int, int], dtype: str, device: torch.device) -> str | None:
    element: torch.dtype = getattr(torch, dtype)
    if name in RIVALS:
        return RIVALS[name].absence(device) or RIVALS[name].refusal(unit, element, device)
    return None if name == "auto" else backend_named(name).refusal(unit, device, element)


@contextmanager
def _left_out_where_it_fails(name: str, device: torch.device) -> Iterator[None]:
    """What a library of others cannot do on some GPU is said, and ends no measurement."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if name not in RIVALS or device.type == "cpu":
            raise
        log.warning("%s is left out: %s", name, str(error).split("\n")[0])


def _work(layer: nn.Module, x_TI: Tensor, dy_TO: Tensor, which: str) -> Phases:
    """A forward pass, or forward and backward to the input and all parameters."""
    if which == FORWARD:

        def infer() -> None:
            with torch.no_grad():
                layer(x_TI)

        return {"forward": infer}
    x_TI = x_TI.clone().requires_grad_()
    made: list[Tensor] = []

    def forward() -> None:
        made.append(layer(x_TI))

    def backward() -> None:
        x_TI.grad = None
        layer.zero_grad()
        made.pop().backward(dy_TO)

    return {"forward": forward, "backward": backward}


def _compared(timing: Timing, dense: Timing) -> Row:
    row: Row = {
        "seconds": timing.seconds,
        "dense_seconds": dense.seconds,
        "ratio": dense.seconds / timing.seconds,
        "cpu_seconds": timing.cpu_seconds,
        "dense_cpu_seconds": dense.cpu_seconds,
        "cpu_ratio": dense.cpu_seconds / timing.cpu_seconds if timing.cpu_seconds else None,
    }
    if "backward" in timing.phases:
        row["backward_seconds"] = timing.phases["backward"]
        row["dense_backward_seconds"] = dense.phases["backward"]
        row["backward_ratio"] = dense.phases["backward"] / timing.phases["backward"]
    return row
