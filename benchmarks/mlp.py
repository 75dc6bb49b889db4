"""Where an MLP computed at once beats one computed layer by layer: `python benchmarks/mlp.py FILE [ROUNDS]`.

Sparse MLPs of GPT-2 and of Llama by their density, forward alone and with backward, keeping nothing, bfloat16 or
float32 of the hidden layer; all ways take turns, on one thread. A row's cpu_ratio is the CPU time layer by layer over
that at once. FILE gets the rows as JSON; SPARSAE_ISA chooses the instruction set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sparsae import sparsify
from sparsae.bench.clock import CPU, Phases, interleaved, using_threads
from sparsae.core.randomness import generator
from sparsae.kernels.cpu import library
from sparsae.kernels.mlp import KEEPS
from sparsae.nn.mlp import FusedMLP
from sparsae.train.memory import keep_freed_memory

TOKENS = 2048
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


def way(mlp: nn.Module, keeps: str | None) -> tuple[Phases, Phases]:
    """Forward alone, and with backward. keeps: of an MLP at once; None: layer by layer."""
    rng = generator(0, "mlp")
    width = next(mlp.children()).in_features
    x = torch.randn(TOKENS, width, generator=rng, device=CPU).requires_grad_()
    dy = torch.randn(TOKENS, width, generator=rng, device=CPU)
    found: list[torch.Tensor] = []

    def forward() -> None:
        if keeps is not None:
            mlp.keeps = keeps  # type: ignore[assignment]
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
                mlp._fuses = lambda *_: True  # type: ignore[method-assign]
                ways = {keeps: way(mlp, keeps) for keeps in KEEPS}
                single = way(mlp.original, None)
                common = {"gated": gated, "width": width, "hidden": hidden, "unit": f"{unit[0]}x{unit[1]}"}
                common |= {"density": density, "tokens": TOKENS, "isa": library.isa()}
                for number, name in enumerate(("forward", "forward+backward")):
                    kept = ["nothing"] if name == "forward" else list(ways)
                    contenders = [single[number], *(ways[keeps][number] for keeps in kept)]
                    apart, *at_once = interleaved(contenders, rounds, threads=1)
                    for keeps, timing in zip(kept, at_once, strict=True):
                        yield {
                            **common,
                            "pass": name,
                            "keeps": keeps,
                            "cpu_seconds": timing.cpu_seconds,
                            "single_cpu_seconds": apart.cpu_seconds,
                            "cpu_ratio": apart.cpu_seconds / timing.cpu_seconds,
                        }


def main(file: Path, rounds: int) -> None:
    """Print the rows as they are measured, and write all of them."""
    keep_freed_memory(CPU)
    with using_threads(1):
        found = []
        for row in rows(rounds):
            found.append(row)
            print({key: value for key, value in row.items() if "seconds" not in key}, flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 5)
