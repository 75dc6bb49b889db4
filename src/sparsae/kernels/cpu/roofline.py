"""What this machine computes at most, and what it moves at most, measured by the native kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sparsae.kernels.cpu import native

_ROUNDS = 1_000_000
_FLOATS = 2**25  # 128 MiB an array: three of them are more than any level-3 cache that one is lent


def flops(threads: int, seconds: float) -> float:
    """float32 operations a second of multiply-adds in registers, the best of repeated runs."""
    native.multiply_add(_ROUNDS // 10, threads)
    return _best(lambda: native.multiply_add(_ROUNDS, threads), seconds)


def bandwidth(threads: int, seconds: float) -> float:
    """Bytes a second of a = b + 3 c, 12 bytes an element (STREAM's triad), the best of repeated runs."""
    a, b, c = (torch.full((_FLOATS,), float(i), dtype=torch.float32, device="cpu") for i in range(3))

    def move() -> float:
        native.triad(a, b, c, threads)
        return 12.0 * _FLOATS

    move()
    return _best(move, seconds)


def _best(work: Callable[[], float], seconds: float) -> float:
    best, began = 0.0, time.perf_counter()
    while True:
        start = time.perf_counter()
        best = max(best, work() / (time.perf_counter() - start))
        if time.perf_counter() - began >= seconds:
            return best
