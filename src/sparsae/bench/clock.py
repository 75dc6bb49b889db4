"""Times that can be compared: the contenders take turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

# The parts of one piece of work, in the order in which they run.
Phases = Mapping[str, Callable[[], None]]


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds, in seconds: wall time and CPU time of the whole, wall time of each part.

    CPU time is that of the calling thread where one thread computes, else that of the process.
    """

    seconds: float
    cpu_seconds: float
    phases: Mapping[str, float]


def interleaved(contenders: Sequence[Phases], rounds: int, threads: int, warm_up: int = 1) -> list[Timing]:
    """The timing of each contender, all taking turns, after `warm_up` rounds that do not count."""
    cpu_clock = time.thread_time if threads == 1 else time.process_time
    walls: list[list[list[float]]] = [[] for _ in contenders]
    cpus: list[list[float]] = [[] for _ in contenders]
    for round_ in range(warm_up + rounds):
        for phases, wall, cpu in zip(contenders, walls, cpus, strict=True):
            cpu_start, marks = cpu_clock(), [time.perf_counter()]
            for work in phases.values():
                work()
                marks.append(time.perf_counter())
            if round_ >= warm_up:
                wall.append([after - before for before, after in pairwise(marks)])
                cpu.append(cpu_clock() - cpu_start)
    return [
        Timing(
            statistics.median(map(sum, wall)),
            statistics.median(cpu),
            dict(zip(phases, map(statistics.median, zip(*wall, strict=True)), strict=True)),
        )
        for phases, wall, cpu in zip(contenders, walls, cpus, strict=True)
    ]


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let torch, and the native kernels with it, compute on so many threads while inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(map(math.log, ratios)))
