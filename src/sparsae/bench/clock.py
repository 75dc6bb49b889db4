"""Times that can be compared: the contenders take turns, so that whatever else the machine does meets all of them.

On a GPU the time is the GPU's own, between events. It first sleeps for as long as Python takes to hand over the work,
so that the time is that of the work, not of the handing over, which a compiled step and a CUDA graph do without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparsae.kernels.processor import set_up_processor

_SLEEP = 4_000_000  # cycles of a GPU, some two milliseconds

CPU = torch.device("cpu")
# The parts of one piece of work, in the order in which they run.
Phases = Mapping[str, Callable[[], None]]


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds, in seconds: time and CPU time of the whole, time of each part.

    On a CPU the time is wall time, on a GPU that of the GPU. CPU time is that of the calling thread where one thread
    computes, else that of the process.
    """

    seconds: float
    cpu_seconds: float
    phases: Mapping[str, float]


def interleaved(
    contenders: Sequence[Phases],
    rounds: int,
    threads: int,
    device: torch.device = CPU,
) -> list[Timing]:
    """The timing of each contender, all taking turns, after a round that does not count."""
    cpu_clock = time.thread_time if threads == 1 else time.process_time
    walls: list[list[list[float]]] = [[] for _ in contenders]
    cpus: list[list[float]] = [[] for _ in contenders]
    for round_ in range(1 + rounds):
        for phases, wall, cpu in zip(contenders, walls, cpus, strict=True):
            cpu_start = cpu_clock()
            seconds = _on_gpu(phases, device) if device.type == "cuda" else _on_cpu(phases)
            if round_:
                wall.append(seconds)
                cpu.append(cpu_clock() - cpu_start)
    return [
        Timing(
            statistics.median(map(sum, wall)),
            statistics.median(cpu),
            dict(zip(phases, map(statistics.median, zip(*wall, strict=True)), strict=True)),
        )
        for phases, wall, cpu in zip(contenders, walls, cpus, strict=True)
    ]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_cpu(phases: Phases) -> list[float]:
    marks = [time.perf_counter()]
    for work in phases.values():
        work()
        marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


def _on_gpu(phases: Phases, device: torch.device) -> list[float]:
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        torch.cuda.synchronize()
        torch.cuda._sleep(_SLEEP)
        events[0].record()
        for work, event in zip(phases.values(), events[1:], strict=True):
            work()
            event.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let torch, and the native kernels with it, compute on so many threads while inside, as a training run does."""
    before = torch.get_num_threads()
    set_up_processor(threads)
    try:
        yield
    finally:
        set_up_processor(before)
