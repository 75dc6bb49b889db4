"""The roofline of this machine (Williams et al., 2009): what it computes at most, and what it moves at most."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsae.bench.clock import CPU
from sparsae.bench.rows import Column, Row
from sparsae.errors import InputError
from sparsae.kernels.backend import Limits
from sparsae.kernels.registry import BACKENDS

COLUMNS = (
    Column("processor", "processor", width=24),
    Column("isa", "isa"),
    Column("threads", "threads", width=7),
    Column("GFLOP/s", lambda row: row["flops_per_second"] / 1e9, ".1f", 9),
    Column("GB/s", lambda row: row["bytes_per_second"] / 1e9, ".1f"),
    Column("FLOP/byte at the ridge", "ridge_flops_per_byte", ".1f", 22),
)


def limits(device: torch.device = CPU) -> Limits | str:
    """What a device does at most, by the first backend that can tell, or why none can."""
    reasons = []
    for backend in BACKENDS.values():
        answer = backend.limits(device)
        if isinstance(answer, Limits):
            return answer
        reasons.append(answer)
    return "; ".join(reasons)


@dataclass(frozen=True)
class Roofline:
    """What is measured. Raises InputError where no backend can."""

    threads: Sequence[int]
    seconds: float

    def __post_init__(self) -> None:
        found = limits()
        if isinstance(found, str):
            raise InputError(f"the roofline cannot be measured: {found}")

    def __len__(self) -> int:
        return len(self.threads)

    def measure(self) -> Iterator[list[Row]]:
        """A row for each number of threads."""
        found = limits()
        assert isinstance(found, Limits)
        for count in self.threads:
            flops, moved = found.flops(count, self.seconds), found.bandwidth(count, self.seconds)
            yield [
                {
                    "processor": _processor(),
                    "torch": torch.__version__,
                    "isa": found.instructions,
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
