"""A ramp beside every optimizer that people use: its weight decay is not ramped, or the two are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.optimizer_state import parts_of
from sparsae.rules import SetConfig
from sparsae.search.sparsifier import Sparsifier
from tests.support.optimizers import REFUSED, TORCH, VARIANTS, of

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    name: make for name, make in (TORCH | VARIANTS).items() if name not in REFUSED["weights"]
} | {
    **{
        f"{name}, decoupled": of("torch.optim", name, lr=0.01, decoupled_weight_decay=True)
        for name in ("Adam", "NAdam", "RAdam")
    },
    "Adam8bit": of("torchao.optim", "Adam8bit", lr=0.01),
    "Adan, decoupled": of("pytorch_optimizer", "Adan", lr=0.01, weight_decouple=True),
    "Lion, fixed": of("pytorch_optimizer", "Lion", lr=0.01, fixed_decay=True),
    "Lion, L2": of("pytorch_optimizer", "Lion", lr=0.01, weight_decouple=False),
}
# Added to the gradient, a part of the step; or none at all.
IN_THE_GRADIENT = {
    *("Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "RMSprop, all", "Rprop", "SGD"),
    *("Adagrad, not from zero", "SGD, momentum", "Adam8bit", "Lion, L2", "SM3"),
}
# Their weights are computed from copies.
AHEAD = {"Lookahead", "ScheduleFreeAdamW", "ScheduleFreeSGD", "MADGRAD", "Ranger21"}
# How their decay acts is not known.
UNKNOWN = {"AdaFactor", "Prodigy"}
RAMP, DECAY, TOKENS = 6, 3.0, 8


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step, for every shape anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def prepared(name: str, decay: float, *, ramp: int = RAMP) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), 0.5, seed=1)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for group in optimizer.param_groups:
        if "lambd" in group:
            group["lambd"] = decay
        elif "weight_decay" in group:
            group["weight_decay"] = decay
    config = SparsifierConfig(steps=40, topology=SetConfig(every=3, ramp=ramp, ramp_first=ramp > 0))
    return model, optimizer, Sparsifier(model, optimizer, config)


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(torch.randn(TOKENS, 16, generator=generator(step, "x"))).square().mean().backward()


def twin_of(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[SparseLinear, torch.optim.Optimizer]:
    """Copies of the first layer and the optimizer, with their gradients and states, and no ramp."""
    other = copy.deepcopy(model)
    pairs = dict(zip(model.parameters(), other.parameters(), strict=True))
    for p, q in pairs.items():
        q.grad = None if p.grad is None else p.grad.clone()
    made = OPTIMIZERS[name](list(other.parameters()))
    for part, own in zip(parts_of(optimizer), parts_of(made), strict=True):
        for group, mine in zip(part.param_groups, own.param_groups, strict=True):
            mine |= {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} | {"ramp": 0}
        for key, value in part.state.items():
            own.state[pairs.get(key, key)] = copy.deepcopy(value)
    return sparse_layers(other)["0"], made


def share_taken(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """What a step takes of a value for being larger, measured: two steps that differ in one value alone."""
    ends: list[float] = []
    for more in (0.0, 0.02):
        layer, made = twin_of(name, model, optimizer)
        layer.values.data[0] += more
        made.step()
        ends.append(float(layer.values[0].detach().double()))
    return 1.0 - (ends[1] - ends[0]) / 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_young_connection_decays_as_an_old_one(name: str, group: None) -> None:
    if name in AHEAD | UNKNOWN:
        with pytest.raises(InputError, match=f"{name} cannot ramp .*AdamW.*ramp to 0"):
            prepared(name, DECAY)
        assert prepared(name, DECAY, ramp=0)
        assert name in AHEAD or prepared(name, 0.0)
        return
    model, optimizer, sparsifier = prepared(name, DECAY)
    decays = any("weight_decay" in group or "lambd" in group for group in optimizer.param_groups)
    layer, is_apart = sparse_layers(model)["0"], name not in IN_THE_GRADIENT
    assert decays or not is_apart
    age = torch.zeros(layer.topology.count)
    for step in range(7):
        backward(model, step)
        before, (other, made) = layer.values.detach().clone(), twin_of(name, model, optimizer)
        made.step()
        whole, taken = other.values.detach(), 0.0
        is_step = not torch.equal(whole, before)  # the first of some is none
        if is_apart and is_step:
            taken = share_taken(name, model, optimizer)
            assert taken > 0.002
        sparsifier.before_step()
        optimizer.step()
        age += is_step
        update = sparsifier.after_step()
        start = before * (1.0 - taken)
        expected = start + (age / RAMP).clamp(max=1.0) * (whole - start)
        change = update.changes.get("0") if update else None
        stayed = torch.ones_like(age, dtype=torch.bool) if change is None else change.source >= 0
        source = torch.arange(len(age)) if change is None else change.source
        now = layer.values.detach()[stayed]
        scale = float((whole - start).abs().max())
        torch.testing.assert_close(now, expected[source[stayed]], rtol=1e-3, atol=max(2e-3 * scale, 1e-6))
        age = torch.where(stayed, age[source.clamp(min=0)], torch.zeros_like(age))


def test_every_optimizer_is_known_for_what_it_does() -> None:
    assert set(OPTIMIZERS) > AHEAD | UNKNOWN
    assert set(OPTIMIZERS) > IN_THE_GRADIENT


class Slow(torch.optim.SGD):
    """Whose weights follow a copy, under a name that nobody knows."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("z", p.detach().clone())
        super().step()


def test_a_copy_that_comes_with_the_first_step_is_found() -> None:
    model = sparsify(nn.Sequential(nn.Linear(16, 12)), 0.5, seed=1)
    optimizer = Slow(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=9, topology=SetConfig(every=2, ramp=4)))
    backward(model, 0)
    sparsifier.before_step()
    optimizer.step()
    sparsifier.after_step()
    backward(model, 1)
    sparsifier.before_step()
    optimizer.step()
    sparsifier.after_step()  # connections have grown, which are young
    backward(model, 1)
    with pytest.raises(InputError, match=r"Slow cannot ramp .*'z'"):
        sparsifier.before_step()
