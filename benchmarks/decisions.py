"""The same decisions on a device as on the CPU: `python benchmarks/decisions.py DEVICE FILE`.

One seed trains one small model in float32 on both, by each rule; rows tell which share of the last topology's units is
the same, and how often an update of 2 and of 8 layers waited for the device as torch sees it
(torch.cuda.set_sync_debug_mode; waits for several copies at once are not among them). It fails where a topology
differs by more than rounding can do: scores that differ by less than that may be taken in another order.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsae import Sparsifier, SparsifierConfig, sparsify
from sparsae.bench.clock import using_threads
from sparsae.bench.rows import device_name
from sparsae.core.randomness import generator
from sparsae.nn.linear import sparse_layers
from sparsae.optim import AdamW

STEPS, EVERY, WIDTH, LAYERS = 24, 4, 96, (2, 8)
# By rule, the least share of units that has to be the same.
RULES = {"generations": 0.98, "set": 0.98, "gse": 0.95, "rigl": 0.95, "evolution": 0.95}


def trained(rule: str, layers: int, device: torch.device) -> tuple[list[set[int]], int]:
    """The units of each layer in the end, and how often the last update waited."""
    rng = generator(0, "decisions")
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) / WIDTH**0.5
    sparsify(model, 0.9, seed=0)
    model.to(device)
    data = torch.randn(STEPS, 64, WIDTH, generator=rng).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3, per_weight_step=True)

    def score(step: int) -> torch.Tensor:
        return (model(data[step % STEPS]) - data[step % STEPS]).square().mean()

    config = SparsifierConfig(steps=STEPS + EVERY, topology={"rule": rule, "every": EVERY})
    sparsifier = Sparsifier(model, optimizer, config, score=score if rule == "evolution" else None)
    waits = 0
    for step in range(STEPS):
        optimizer.zero_grad()
        score(step).backward()
        with counted(device) as found:
            sparsifier.before_step()
        optimizer.step()
        with counted(device) as more:
            update = sparsifier.after_step()
        if update is not None:
            waits = sum("synchroniz" in str(warning.message) for warning in (*found, *more))
    return [set(layer.indices.tolist()) for layer in sparse_layers(model).values()], waits


@contextmanager
def counted(device: torch.device) -> Iterator[list[Any]]:
    """What torch says of operations that wait for a GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def main(device: torch.device, file: Path) -> bool:
    """Whether all rules decided alike."""
    torch.backends.cuda.matmul.allow_tf32 = False
    alike = True
    for rule, least in RULES.items():
        row: dict[str, Any] = {"part": "decisions", "device": device_name(device), "rule": rule}
        for layers in LAYERS:
            here, _ = trained(rule, layers, torch.device("cpu"))
            there, waits = trained(rule, layers, device)
            same = sum(len(a & b) for a, b in zip(here, there, strict=True)) / sum(map(len, here))
            alike &= same >= least
            row |= {f"same_{layers}": same, f"waits_{layers}": waits}
        row["least"] = least
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    return alike


if __name__ == "__main__":
    with using_threads(1):
        succeeded = main(torch.device(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(0 if succeeded else 1)
