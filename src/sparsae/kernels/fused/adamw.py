"""AdamW of parameters that count steps by weight, all of them in one launch.

`sparsae.optim` has the formula, and does it in fifteen passes over memory. Parameters lie anywhere: a program finds the
addresses of its own in a table, which goes to the device with every step, since gradients are new tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsae.core.host import on_device

_CHUNK = 1024  # weights that a program updates
_COLUMNS = 6  # of the table: parameter, gradient, both averages, steps; how many weights


def update_by_weight(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    rates: Sequence[float],
    decays: Sequence[float],
    totals: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    ramp: int,
) -> None:
    """One step of every parameter, in place.

    All of float32 and contiguous but `steps`, of int32. decays: factors on the weights before the step. ramp: 0, or
    weights of that age and more learn at their whole rate, as do those of the age in `totals`.
    """
    device, sizes = parameters[0].device, tuple(p.numel() for p in parameters)
    columns = (parameters, grads, averages, squares, steps)
    rows = [[t.data_ptr() for t in own] + [size] for *own, size in zip(*columns, sizes, strict=True)]
    numbers = [list(own) for own in zip(rates, decays, totals, strict=True)]
    owner, first = _programs(sizes, str(device))
    if owner.numel():
        beta1, beta2 = betas
        _adamw[(owner.numel(),)](
            *(_sent(rows, torch.int64, device), _sent(numbers, torch.float32, device), owner, first),
            *(1 - beta1, beta2, 1 - beta2, _log(beta1), _log(beta2), eps, ramp),
            RAMPS=ramp > 0,
            COLUMNS=_COLUMNS,
            CHUNK=_CHUNK,
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _sent(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=dtype, device="cpu")
    return on_device(table, device)


@lru_cache(maxsize=32)
def _programs(sizes: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Of each program its parameter, and its first weight."""
    counts = torch.tensor([-(-size // _CHUNK) for size in sizes], dtype=torch.int64, device="cpu")
    owner = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(counts)
    programs = torch.arange(len(owner), dtype=torch.int64, device="cpu")
    first = (programs - (counts.cumsum(0) - counts)[owner]) * _CHUNK
    return owner.to(device), first.to(device)


@triton.jit
def _correction(x):
    # 1 - exp(x) of x <= 0. The difference loses the digits of a small one.
    small = -x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(x > -0.1, small, 1 - tl.exp(x))


@triton.jit(do_not_specialize=["rest1", "beta2", "rest2", "log1", "log2", "eps", "ramp"])
def _adamw(
    table,
    numbers,
    owner,
    first,
    rest1,
    beta2,
    rest2,
    log1,
    log2,
    eps,
    ramp,
    RAMPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    own = tl.load(owner + program)
    row = table + own * COLUMNS
    place = tl.load(first + program) + tl.arange(0, CHUNK)
    inside = place < tl.load(row + 5)
    p = tl.load(row).to(tl.pointer_type(tl.float32)) + place
    g = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
    m = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + place
    v = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + place
    s = tl.load(row + 4).to(tl.pointer_type(tl.int32)) + place
    rate, decay = tl.load(numbers + own * 3), tl.load(numbers + own * 3 + 1)

    step = tl.load(s, mask=inside, other=0) + 1
    average = tl.load(m, mask=inside, other=0.0)
    average += (g - average) * rest1
    square = tl.load(v, mask=inside, other=0.0) * beta2 + g * g * rest2
    age = step.to(tl.float32)
    denominator = (tl.sqrt(square / _correction(age * log2)) + eps) * _correction(age * log1)
    if RAMPS:
        share = tl.minimum(age / ramp, 1.0)
        denominator /= tl.where(age == tl.load(numbers + own * 3 + 2), 1.0, share)
    value = tl.load(p, mask=inside, other=0.0) * decay - rate * (average / denominator)
    tl.store(p, value, mask=inside)
    tl.store(m, average, mask=inside)
    tl.store(v, square, mask=inside)
    tl.store(s, step, mask=inside)
