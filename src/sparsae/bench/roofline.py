"""The roofline of this machine (Williams et al., 2009): what it computes at most, and what it moves at most."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsae.bench.rows import Column, Row
from sparsae.errors import InputError
from sparsae.kernels.cpu import native

COLUMNS = (
    Column("processor", "processor", width=24),
    Column("isa", "isa"),
    Column("threads", "threads", width=7),
    Column("GFLOP/s", lambda row: row["flops_per_second"] / 1e9, ".1f", 9),
    Column("GB/s", lambda row: row["bytes_per_second"] / 1e9, ".1f"),
    Column("FLOP/byte at the ridge", "ridge_flops_per_byte", ".1f", 22),
)
_ROUNDS = 1_000_000
_FLOATS = 2**25  # 128 MiB an array: three of them are more than any level-3 cache that one is lent


def peak_flops(threads: int, seconds: float = 0.2) -> float | None:
    """float32 operations a second of multiply-adds in registers, the best of repeated runs; None without kernels."""
    if native.absence() is not None:
        return None
    native.multiply_add(_ROUNDS // 10, threads)
    return _best(lambda: native.multiply_add(_ROUNDS, threads), seconds)


def bandwidth(threads: int, seconds: float = 0.5, floats: int = _FLOATS) -> float:
    """Bytes a second of a = b + 3 c, 12 bytes an element (STREAM's triad), the best of repeated runs."""
    a, b, c = (torch.full((floats,), float(i), dtype=torch.float32, device="cpu") for i in range(3))

    def move() -> float:
        native.triad(a, b, c, threads)
        return 12.0 * floats

    move()
    return _best(move, seconds)


@dataclass(frozen=True)
class Roofline:
    """What is measured. Raises InputError where there are no native kernels."""

    threads: Sequence[int]
    seconds: float

    def __post_init__(self) -> None:
        absence = native.absence()
        if absence is not None:
            raise InputError(f"the roofline is measured by the native kernels: {absence}")

    def __len__(self) -> int:
        return len(self.threads)

    def measure(self) -> Iterator[list[Row]]:
        """A row for each number of threads."""
        for count in self.threads:
            flops, moved = peak_flops(count, self.seconds), bandwidth(count, self.seconds)
            assert flops is not None
            yield [
                {
                    "processor": _processor(),
                    "torch": torch.__version__,
                    "isa": native.isa(),
                    "threads": count,
                    "flops_per_second": flops,
                    "bytes_per_second": moved,
                    "ridge_flops_per_byte": flops / moved,
                }
            ]


def _processor() -> str:
    """Its name, as the system has it."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(errors="replace") if information.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _best(work: Callable[[], float], seconds: float) -> float:
    best, began = 0.0, time.perf_counter()
    while True:
        start = time.perf_counter()
        best = max(best, work() / (time.perf_counter() - start))
        if time.perf_counter() - began >= seconds:
            return best
