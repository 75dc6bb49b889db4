"""Causal attention on the CPU beside torch's: `python benchmarks/attention.py FILE [ROUNDS]`.

Sparsae's kernel, torch's `scaled_dot_product_attention` and batched products that keep their probabilities take turns,
in float32 on one thread, forward alone and with backward. A row's ratios are another's time over the kernel's; GFLOP/s
are of the causal half alone: 4 a score and feature forward, 12 with backward. FILE gets the rows as JSON; SPARSAE_ISA
chooses the kernel's instruction set (torch's: see docs/results/kernels.md).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsae.bench.clock import CPU, Phases, Timing, interleaved, using_threads
from sparsae.core.randomness import generator
from sparsae.kernels.cpu import library
from sparsae.kernels.cpu.attention import causal_attention
from sparsae.train.memory import keep_freed_memory

# batch, heads, heads of keys and values, tokens, size of a head
CASES = (
    (16, 7, 7, 128, 32),
    (16, 8, 8, 128, 48),
    (8, 8, 8, 256, 48),
    (4, 8, 8, 512, 48),
    (4, 8, 8, 512, 64),
    (4, 8, 2, 512, 64),
    (2, 12, 12, 1024, 64),
    (1, 8, 8, 2048, 64),
    (1, 8, 8, 1024, 128),
)
FORWARD, BOTH = "forward", "forward+backward"
QUERIES = 64  # of a block, where probabilities are kept
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the kernel, which computes probabilities again for backward."""
    return causal_attention(q, k, v, q.shape[-1] ** -0.5)


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By torch's flash attention for CPUs."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By torch's batched products over blocks of queries, none right of the diagonal's; probabilities are kept."""
    shared, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (k, v))
    blocks = []
    for first, end in pairwise([*range(0, tokens, QUERIES), tokens]):
        scores = q[:, :, first:end] @ k[:, :, :end].transpose(-1, -2) * q.shape[-1] ** -0.5
        future = torch.ones(end - first, end, dtype=torch.bool, device=CPU).triu(first + 1)
        blocks.append(scores.masked_fill_(future, -math.inf).softmax(-1) @ v[:, :, :end])
    return torch.cat(blocks, 2)


WAYS: dict[str, Way] = {"ours": ours, "torch": torchs, "kept": kept}


def contender(way: Way, case: tuple[int, ...]) -> tuple[Phases, Phases]:
    """Forward alone, and with backward."""
    batch, heads, groups, tokens, size = case
    rng = generator(0, "attention")
    q, k, v = (
        torch.randn(batch, n, tokens, size, generator=rng, device=CPU).requires_grad_() for n in (heads, groups, groups)
    )
    dy = torch.randn(batch, heads, tokens, size, generator=rng, device=CPU)
    found: list[Tensor] = []

    def forward() -> None:
        found[:] = [way(q, k, v)]

    def alone() -> None:
        with torch.no_grad():
            forward()

    def backward() -> None:
        found.pop().backward(dy)
        q.grad = k.grad = v.grad = None

    return {"forward": alone}, {"forward": forward, "backward": backward}


def rows(cases: tuple[tuple[int, ...], ...], rounds: int) -> Iterator[dict[str, Any]]:
    """Two rows for each case: forward alone, and with backward."""
    for case in cases:
        both = [contender(way, case) for way in WAYS.values()]
        for number, which in enumerate((FORWARD, BOTH)):
            timings = interleaved([each[number] for each in both], rounds, threads=1)
            yield _row(case, which, dict(zip(WAYS, timings, strict=True)))


def _row(case: tuple[int, ...], which: str, timings: dict[str, Timing]) -> dict[str, Any]:
    batch, heads, groups, tokens, size = case
    row: dict[str, Any] = {"batch": batch, "heads": heads, "groups": groups, "tokens": tokens, "size": size}
    row |= {"pass": which, "dtype": "float32", "threads": 1, "isa": library.isa()}
    scores = batch * heads * tokens * (tokens + 1) // 2
    flops = (4 if which == FORWARD else 12) * scores * size
    for name, timing in timings.items():
        row[f"{name}_seconds"], row[f"{name}_cpu_seconds"] = timing.seconds, timing.cpu_seconds
        row[f"{name}_gflops"] = flops / timing.cpu_seconds / 1e9
    for name in ("torch", "kept"):
        row[f"{name}_cpu_ratio"] = timings[name].cpu_seconds / timings["ours"].cpu_seconds
    return row


def main(file: Path, rounds: int) -> None:
    """Print the rows as they are measured, and write all of them."""
    keep_freed_memory(CPU)
    found = []
    with using_threads(1):
        for row in rows(CASES, rounds):
            found.append(row)
            print({key: value for key, value in row.items() if "seconds" not in key}, flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 9)
