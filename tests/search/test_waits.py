"""How often an update waits for a device: not once more for each layer."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsae import Sparsifier, SparsifierConfig, sparsify
from sparsae.core.host import on_host
from sparsae.nn.linear import sparse_layers
from sparsae.optim import AdamW

# What has to know numbers, or how many there are, before it returns.
WAITING = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.numpy),
    *(Tensor.cpu, Tensor.nonzero, torch.nonzero, Tensor.equal, torch.equal, Tensor.unique, torch.unique),
    *(Tensor.masked_select, torch.masked_select, Tensor.bincount, torch.bincount),
    *(Tensor.repeat_interleave, torch.repeat_interleave, Tensor.allclose, torch.allclose, torch.is_nonzero),
}
# Functions whose tensors are on the CPU wherever the model is, and the one that brings them there.
ON_THE_CPU = {"sample_distinct", "row", "on_host"}
# It waits on the CPU alone.
SAFE = "ranking.py", "positions"

Stepping = Callable[[Any], torch.optim.Optimizer]


class Waits(TorchFunctionMode):
    """Counts calls that would wait for a GPU if the model were there, by where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.brought: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func in WAITING or (func in (Tensor.__getitem__, Tensor.__setitem__) and _is_masked(args[1]))
        if waits and id(args[0]) not in self.brought:
            frames = traceback.extract_stack()[:-1]
            is_safe = frames[-1].filename.endswith(SAFE[0]) and frames[-1].name == SAFE[1]
            if not is_safe and not ON_THE_CPU & {frame.name for frame in frames}:
                self.found[f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}"] += 1
        return func(*args, **(kwargs or {}))

    def bring(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`on_host`, which waits once for all."""
        self.found["on_host"] += bool(tensors)
        found = on_host(tensors)
        self.brought |= {id(tensor): tensor for tensor in found}
        return found


def _is_masked(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and (part.dtype == torch.bool or not part.dim()) for part in parts)


def waits(rule: str, steps: Stepping, layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of one update of a model of so many sparse layers."""
    found = Waits()
    for module in ("surgery", "search.telemetry", "search.capture", "core.shards"):
        monkeypatch.setattr(f"sparsae.{module}.on_host", found.bring)
    model = sparsify(nn.Sequential(*(nn.Linear(48, 48) for _ in range(layers))), 0.8, budget="uniform")
    keys = [layer.key for layer in sparse_layers(model).values()]  # on the CPU, always
    found.brought |= {id(key): key for key in keys}
    optimizer = steps(model.parameters())
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=100, topology={"rule": rule, "every": 2}))
    for _ in range(2):
        model(torch.randn(8, 48)).square().mean().backward()
        with found:
            sparsifier.before_step()
        optimizer.step()
        with found:
            update = sparsifier.after_step()
        optimizer.zero_grad()
    assert update is not None
    assert len(update.changes) == layers
    sparsifier.close()
    return found.found


@pytest.mark.parametrize(
    "steps",
    [lambda own: AdamW(own, per_weight_step=True), torch.optim.AdamW, partial(torch.optim.SGD, lr=0.1, momentum=0.9)],
    ids=["ours", "adamw", "sgd"],
)
@pytest.mark.parametrize("rule", ["generations", "set", "gse", "mest"])
def test_an_update_waits_as_often_however_many_layers_there_are(
    rule: str, steps: Stepping, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = waits(rule, steps, 2, monkeypatch), waits(rule, steps, 5, monkeypatch)
    assert few == many
    assert 3 <= few["on_host"] <= 10


@pytest.mark.parametrize("case", [bool, float, Tensor.cpu, torch.nonzero, lambda t: t[t > 1]])
def test_what_waits_is_counted(case: Callable[[Tensor], object]) -> None:
    tensor = torch.zeros(1)
    with Waits() as found:
        case(tensor)
        (here,) = found.bring([tensor])
        case(here)
    assert found.found.total() == 2  # the first, and what brought the tensor
