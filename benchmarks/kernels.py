"""Sparse layers against `F.linear`, through autograd, in one run.

For each shape, unit and sparsity the dense layer and our backends take turns; a row gives the median time of each, in
thread CPU time where one thread is used (which other programs on the machine disturb less) and in wall time otherwise.

    python benchmarks/kernels.py --sparsities 0.9 --units 1x1 4x4 --json rows.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels import native
from sparsae.nn.linear import SparseLinear

SHAPES = ["768x768", "3072x768", "768x3072", "4096x1024"]
PASSES = ["forward", "forward+backward"]

Row = dict[str, object]


def pair(text: str) -> tuple[int, int]:
    """'3072x768' to (3072, 768)."""
    first, second = text.split("x")
    return int(first), int(second)


def medians(steps: list[Callable[[], None]], clock: Callable[[], float], rounds: int) -> list[float]:
    """Median seconds of each step, the steps taking turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(rounds + 1):
        for step, taken in zip(steps, times, strict=True):
            start = clock()
            step()
            if round_:
                taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]


def step_of(layer: nn.Module, x_TI: Tensor, dy_TO: Tensor, which: str) -> Callable[[], None]:
    """A forward pass, or forward and backward to the input and all parameters."""
    if which == "forward":

        def step() -> None:
            with torch.no_grad():
                layer(x_TI)
    else:

        def step() -> None:
            x_TI.grad = None
            layer.zero_grad()
            layer(x_TI).backward(dy_TO)

    return step


def rows_of(shape: tuple[int, int], unit: tuple[int, int], sparsity: float, options: argparse.Namespace) -> list[Row]:
    """Both passes of one layer by every backend that was asked for."""
    out_features, in_features = shape
    dtype = getattr(torch, options.dtype)
    rng = generator(0, "bench")
    count = round((1 - sparsity) * out_features * in_features / (unit[0] * unit[1]))
    topology = Topology.random(shape, count, rng, unit)
    values = torch.randn(topology.values_shape, generator=rng).to(dtype)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(in_features, out_features, dtype=dtype)}
    for backend in options.backends:
        layers[backend] = SparseLinear(topology, values, torch.zeros(out_features, dtype=dtype), backend=backend)
    x_TI = torch.randn(options.tokens, in_features, generator=rng).to(dtype).requires_grad_()
    dy_TO = torch.randn(options.tokens, out_features, generator=rng).to(dtype)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    rows: list[Row] = []
    for which in PASSES:
        steps = [step_of(layer, x_TI, dy_TO, which) for layer in layers.values()]
        dense_seconds, *taken = medians(steps, clock, options.rounds)
        for backend, seconds in zip(options.backends, taken, strict=True):
            rows.append(
                {
                    "backend": backend,
                    "unit": f"{unit[0]}x{unit[1]}",
                    "out": out_features,
                    "in": in_features,
                    "tokens": options.tokens,
                    "sparsity": sparsity,
                    "dtype": options.dtype,
                    "threads": options.threads,
                    "pass": which,
                    "seconds": seconds,
                    "dense_seconds": dense_seconds,
                    "ratio": dense_seconds / seconds,
                }
            )
    return rows


def line(row: Row) -> str:
    """One row for people."""
    layer = "{backend:>10} {unit:>6} {out:>6} x {in:<6} {sparsity:.2f} {pass:>17}"
    return (layer + " {seconds:9.5f} s  dense {dense_seconds:9.5f} s  ratio {ratio:6.2f}").format(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=pair, default=[pair(shape) for shape in SHAPES])
    parser.add_argument("--units", nargs="+", type=pair, default=[(1, 1)])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--backends", nargs="+", default=["cpu"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if native.absence() is None:
        print(f"instruction set {native.isa()}, {options.threads} threads, {options.tokens} tokens, {options.dtype}")
    rows: list[Row] = []
    for unit in options.units:
        for sparsity in options.sparsities:
            group = [row for shape in options.shapes for row in rows_of(shape, unit, sparsity, options)]
            for row in group:
                print(line(row), flush=True)
            for backend in options.backends:
                for which in PASSES:
                    logs = [math.log(r["ratio"]) for r in group if (r["backend"], r["pass"]) == (backend, which)]
                    mean = math.exp(statistics.fmean(logs))
                    print(f"{backend:>10} {unit[0]}x{unit[1]} {sparsity:.2f} {which}: geometric mean {mean:.2f}")
            rows += group
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
