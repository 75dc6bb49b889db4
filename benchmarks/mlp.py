"""Where an MLP computed at once beats one computed layer by layer: `python benchmarks/mlp.py FILE [ROUNDS]`.

Sparse MLPs of GPT-2 and of Llama by their density, forward alone (of few tokens too) and with backward, keeping
nothing, bfloat16 or float32 of the hidden layer; all ways take turns, on one thread. A row's cpu_ratio is the CPU time
layer by layer over that at once. FILE gets the rows as JSON; SPARSAE_ISA chooses the instruction set.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sparsae import sparsify
from sparsae.bench.clock import CPU, Phases, interleaved, using_threads
from sparsae.core.randomness import generator
from sparsae.kernels.cpu import breakeven, library
from sparsae.kernels.mlp import KEEPS
from sparsae.nn.mlp import FusedMLP
from sparsae.train.memory import keep_freed_memory

TOKENS, FEW = 2048, (64, 128, 256, 512, 1024)  # with backward, and for forward alone besides
SIZES = ((False, 512, 2048), (False, 768, 3072), (True, 512, 1376), (True, 768, 2048))  # gated, width, hidden
DENSITIES = {(1, 1): (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.36), (4, 4): (0.05, 0.1, 0.15, 0.2, 0.3, 0.45)}


def mlp_of(gated: bool, width: int, hidden: int, density: float, unit: tuple[int, int]) -> FusedMLP:
    """Of a model of one block, sparsified as any other is."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": width // 64}
    config = (
        LlamaConfig(intermediate_size=hidden, **sizes, **common)
        if gated
        else GPT2Config(n_inner=hidden, resid_pdrop=0.0, **sizes, **common)
    )
    model = AutoModelForCausalLM.from_config(config)
    sparsify(model, sparsity=1 - density, unit=unit, budget="uniform", backend="cpu", seed=0)
    return next(module for module in model.modules() if isinstance(module, FusedMLP))


def way(mlp: nn.Module, width: int, tokens: int, keeps: str = "") -> tuple[Phases, Phases]:
    """Forward alone, and with backward. mlp: at once, with what it keeps, or layer by layer."""
    rng = generator(0, "mlp")
    x = torch.randn(tokens, width, generator=rng, device=CPU).requires_grad_()
    dy = torch.randn(tokens, width, generator=rng, device=CPU)
    found: list[torch.Tensor] = []

    def forward() -> None:
        if isinstance(mlp, FusedMLP):
            mlp.keeps = keeps
        found[:] = [mlp(x)]

    def alone() -> None:
        with torch.no_grad():
            forward()

    def backward() -> None:
        found.pop().backward(dy)
        x.grad = None
        for parameter in mlp.parameters():
            parameter.grad = None

    return {"forward": alone}, {"forward": forward, "backward": backward}


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one density after the other."""
    for gated, width, hidden in SIZES:
        for unit, densities in DENSITIES.items():
            for density in densities:
                mlp = mlp_of(gated, width, hidden, density, unit)
                case = {"gated": gated, "width": width, "hidden": hidden, "unit": f"{unit[0]}x{unit[1]}"}
                case |= {"density": density, "isa": library.isa()}
                for tokens in (*FEW, TOKENS):
                    yield from _compared(mlp, {**case, "tokens": tokens, "pass": "forward"}, ["nothing"], rounds)
                yield from _compared(mlp, {**case, "tokens": TOKENS, "pass": "forward+backward"}, list(KEEPS), rounds)


def _compared(mlp: FusedMLP, case: dict[str, Any], keeps: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    number = 0 if case["pass"] == "forward" else 1
    sizes = case["width"], case["tokens"]
    contenders = [way(mlp.original, *sizes)[number], *(way(mlp, *sizes, each)[number] for each in keeps)]
    apart, *at_once = interleaved(contenders, rounds, threads=1)
    for each, timing in zip(keeps, at_once, strict=True):
        seconds = {"cpu_seconds": timing.cpu_seconds, "single_cpu_seconds": apart.cpu_seconds}
        yield {**case, "keeps": each, **seconds, "cpu_ratio": apart.cpu_seconds / timing.cpu_seconds}


def table(by_isa: dict[str, list[dict[str, Any]]]) -> str:
    """Of the lowest ratios next below and next above each limit, as docs/results/kernels.md has it."""
    titles = "MLP, forward and backward", "units", "limit of density"
    ratios = "AVX-512, below it", "above it", "AVX2, below it", "above it"
    lines = [f"| {' | '.join((*titles, *ratios))} |", "|---|---|---:|---:|---:|---:|---:|"]
    for gated, again in breakeven.MLP:
        for unit, limits in (("1x1", breakeven.MLP), ("4x4", breakeven.MLP_BLOCKS)):
            limit, cells = limits[gated, again], []
            for isa in ("avx512", "avx2"):
                lowest: dict[float, float] = {}
                for row in by_isa[isa]:
                    is_one = (row["gated"], row["keeps"] == "nothing", row["unit"]) == (gated, again, unit)
                    if is_one and row["pass"] != "forward":
                        lowest[row["density"]] = min(row["cpu_ratio"], lowest.get(row["density"], math.inf))
                below = max(density for density in lowest if density <= limit)
                above = min((density for density in lowest if density > limit), default=None)
                cells += ["-" if d is None else f"{lowest[d]:.2f} (at {d:g})" for d in (below, above)]
            what = ("gated" if gated else "not gated", "computed again" if again else "kept")
            kind = "single weights" if unit == "1x1" else unit
            lines.append(f"| {what[0]}, hidden layer {what[1]} | {kind} | {limit:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def token_table(by_isa: dict[str, list[dict[str, Any]]]) -> str:
    """Of the lowest and highest ratios of forward alone by tokens."""
    counts = sorted({row["tokens"] for row in by_isa["avx512"]})
    head = "| forward alone, tokens | " + " | ".join(f"{count:,}" for count in counts) + " |"
    lines = [head, "|---|" + "---:|" * len(counts)]
    for gated in (False, True):
        for isa, name in (("avx512", "AVX-512"), ("avx2", "AVX2")):
            cells = []
            for count in counts:
                found = [
                    row["cpu_ratio"]
                    for row in by_isa[isa]
                    if (row["pass"], row["gated"], row["tokens"]) == ("forward", gated, count)
                ]
                cells.append(f"{min(found):.2f} to {max(found):.2f}")
            lines.append(f"| {'gated' if gated else 'not gated'}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(file: Path, rounds: int) -> None:
    """Print the rows as they are measured, and write all of them."""
    keep_freed_memory(CPU)
    with using_threads(1), patch.object(breakeven, "fusing_pays", return_value=True):
        found = []
        for row in rows(rounds):
            found.append(row)
            print({key: value for key, value in row.items() if "seconds" not in key}, flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 5)
