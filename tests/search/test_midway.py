"""Sparse in the middle of somebody's training, and dense again: the optimizer continues with what stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.nn.dense import gathered, scattered, strongest
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.optim import AdamW
from sparsae.rules import GmpConfig, RiglConfig, SetConfig
from sparsae.search.sparsifier import Sparsifier
from tests.support.optimizers import STARTS, STEPS, TORCH, UNITS, VARIANTS

MADE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "ours": lambda parameters: AdamW(parameters, lr=3e-3),
    "ours, a step a weight": lambda parameters: AdamW(parameters, lr=3e-3, per_weight_step=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


def dense(width: int = 24, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A linear layer, transformers' Conv1D, and one that stays dense."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(), Conv1D(width, 2 * width), nn.LayerNorm(width), nn.Linear(width, width)
    ).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    first = next(model.parameters())
    x = torch.randn(8, model[3].normalized_shape[0], generator=generator(5, "x", step)).to(first.dtype)  # type: ignore[index,union-attr]
    return (model(x) - x.roll(1, 1)).square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(tensor: Tensor, layer: SparseLinear) -> Tensor:
    """Something of a dense parameter as (out, in)."""
    return layer.kind.split("weight", tensor)[""]


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value).clone() for key, value in optimizer.state.get(parameter, {}).items()}


@pytest.mark.parametrize("start", ["random", "magnitude"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("name", MADE)
def test_values_moments_and_steps_stay_bit_for_bit_there_and_back(name: str, unit: tuple[int, int], start: Any) -> None:
    model = dense()
    optimizer = MADE[name](list(model.parameters()))
    train(model, optimizer, range(5))
    weights = {i: model[int(i)].weight for i in "02"}
    before = {i: (weight.detach().clone(), state_of(optimizer, weight)) for i, weight in weights.items()}
    places = {i: _place(optimizer, weight) for i, weight in weights.items()}
    others = {k: v.clone() for k, v in model.state_dict().items() if k not in ("0.weight", "2.weight")}
    train_others = [id(p) for p in _parameters(optimizer)]

    sparsify(model, 0.8, unit=unit, start=start, exclude=["4"], optimizer=optimizer)
    layers = sparse_layers(model)
    for i, layer in layers.items():
        weight, kept = before[i]
        assert _place(optimizer, layer.values) == places[i]
        assert torch.equal(layer.values.detach(), gathered(whole(weight, layer), layer.topology))
        now = state_of(optimizer, layer.values)
        assert now.keys() == kept.keys()
        for key, tensor in kept.items():
            there = gathered(whole(tensor, layer), layer.topology) if tensor.dim() else tensor
            assert now[key].dtype == tensor.dtype
            assert torch.equal(now[key], there)
            if key != "step":
                assert bool(there.any())
        assert weights[i] not in optimizer.state
    assert set(optimizer.state) == set(_parameters(optimizer))

    topologies = {i: layer.topology for i, layer in layers.items()}
    assert densify(model, optimizer=optimizer) is model
    for i, layer in layers.items():
        weight, kept = before[i]
        new = model[int(i)].weight
        mask = topologies[i].to_mask()
        assert _place(optimizer, new) == places[i]
        assert torch.equal(whole(new.detach(), layer), whole(weight, layer) * mask)
        for key, tensor in state_of(optimizer, new).items():
            expected = kept[key] if not tensor.dim() else torch.where(mask, whole(kept[key], layer), 0)
            assert torch.equal(whole(tensor, layer) if tensor.dim() else tensor, expected)
    for key, tensor in others.items():
        assert torch.equal(model.state_dict()[key], tensor)
    same = [a == id(b) for a, b in zip(train_others, _parameters(optimizer), strict=True)]
    assert same == [i not in places.values() for i in range(len(same))]
    train(model, optimizer, range(5, 8))


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _place(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    (place,) = [i for i, p in enumerate(_parameters(optimizer)) if p is parameter]
    return place


@pytest.mark.parametrize("name", MADE)
def test_nothing_jumps_where_all_weights_stay(name: str) -> None:
    """Of sparsity 0 the run is the dense one, to rounding."""
    runs = []
    for convert in (False, True):
        model = dense(dtype=torch.float64)
        optimizer = MADE[name](list(model.parameters()))
        losses = train(model, optimizer, range(6))
        if convert:
            sparsify(model, 0.0, exclude=["4"], optimizer=optimizer, backend="reference")
        losses += train(model, optimizer, range(6, 12))
        if convert:
            densify(model, optimizer=optimizer)
        runs.append(losses + train(model, optimizer, range(12, 18)))
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)


@pytest.mark.parametrize("name", MADE)
def test_the_next_step_is_that_of_the_masked_dense_layer(name: str) -> None:
    model = dense(dtype=torch.float64)
    optimizer = MADE[name](list(model.parameters()))
    train(model, optimizer, range(5))
    other = copy.deepcopy(model)
    twin = MADE[name](list(other.parameters()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sparsify(model, 0.8, exclude=["4"], optimizer=optimizer)
    with torch.no_grad():
        for i, layer in sparse_layers(model).items():
            whole(other[int(i)].weight, layer).mul_(layer.topology.to_mask())
    assert train(model, optimizer, range(5, 6)) == pytest.approx(train(other, twin, range(5, 6)), rel=1e-9)
    for i, layer in sparse_layers(model).items():
        expected = gathered(whole(other[int(i)].weight.detach(), layer), layer.topology)
        torch.testing.assert_close(layer.values.detach(), expected, rtol=1e-9, atol=1e-12)


def test_gradients_are_carried_between_backward_and_step() -> None:
    model = dense()
    optimizer = MADE["adamw"](list(model.parameters()))
    loss_of(model, 0).backward()
    weights = {i: model[int(i)].weight for i in "02"}
    sparsify(model, 0.8, exclude=["4"], optimizer=optimizer)
    for i, layer in sparse_layers(model).items():
        gradient = weights[i].grad
        assert gradient is not None
        assert layer.values.grad is not None
        assert torch.equal(layer.values.grad, gathered(whole(gradient, layer), layer.topology))
    optimizer.step()


@pytest.mark.parametrize("attached", [True, False])
def test_a_life_of_dense_pruned_searched_and_dense_again(attached: bool) -> None:
    """One optimizer and one schedule throughout; a teacher from the time on that there is a Sparsifier."""
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

    def go(steps: range, sparsifier: Sparsifier | None = None) -> float:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            if sparsifier and not attached:
                sparsifier.before_step()
            optimizer.step()
            if sparsifier and not attached:
                sparsifier.after_step()
            schedule.step()
            losses.append(float(loss.detach()))
        return sum(losses[-10:]) / 10

    untrained = go(range(10))
    trained = go(range(10, 60))
    sparsify(model, 0.5, start="magnitude", exclude=["4"], optimizer=optimizer)
    config = SparsifierConfig(
        steps=60, topology=GmpConfig(every=5, start=0.0), sparsity=0.8, teacher=TeacherConfig(enabled=True)
    )
    sparsifier = Sparsifier(model, optimizer, config)
    if attached:
        sparsifier.attach()
    pruned = go(range(60, 120), sparsifier)
    assert sparsifier.step == 60
    assert sparsifier.nnz == round(0.2 * 2 * 24 * 48)
    sparsifier.set_rule(SetConfig(every=5))
    sparsifier.close()
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology=RiglConfig(every=5)))
    if attached:
        sparsifier.attach()
    searched = go(range(120, 160), sparsifier)
    sparsifier.close()
    densify(model, optimizer=optimizer)
    again = go(range(160, 190))
    assert schedule.last_epoch == 190
    assert untrained > trained
    assert max(pruned, searched, again) < untrained
    assert again < searched


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", [name for name in (*TORCH, *VARIANTS) if name not in ("Muon", "SparseAdam")])
def test_every_optimizer_follows_or_is_refused(name: str, unit: str, group: None) -> None:
    """What was kept of a weight is kept of the value, there and back; what is refused is as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 160), nn.GELU(), nn.Linear(160, 192))
    optimizer = (TORCH | VARIANTS)[name](list(model.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 128, generator=generator(1, "x"))) - 1.0).square().mean()
        loss.backward()
        return loss

    def step() -> None:
        loss = closure()
        optimizer.step(closure if name == "LBFGS" else None)  # type: ignore[arg-type]
        assert math.isfinite(float(loss.detach()))

    with torch.compiler.set_stance("force_eager"):
        for _ in range(0 if name == "Kron" else 3):  # which takes gigabytes
            step()
        if name in REFUSED:
            before = list(model), [list(g["params"]) for g in optimizer.param_groups], _kept(optimizer, model[0].weight)
            with pytest.raises(InputError, match="cannot follow layers that become sparse or dense: ") as caught:
                _sparser(model, optimizer, UNITS[unit])
            assert "\n" not in str(caught.value)
            after = list(model), [list(g["params"]) for g in optimizer.param_groups], _kept(optimizer, model[0].weight)
            assert after[:2] == before[:2]
            assert after[2].keys() == before[2].keys()
            return
        for is_back in (False, True):
            modules = [model[0], model[2]]
            kept = [_kept(optimizer, m.values if is_back else m.weight) for m in modules]
            if is_back:
                densify(model, optimizer=optimizer)
            else:
                _sparser(model, optimizer, UNITS[unit])
            for old, new, was in zip(modules, (model[0], model[2]), kept, strict=True):
                now = _kept(optimizer, new.weight if is_back else new.values)
                assert was.keys() == now.keys()
                for key, tensor in was.items():
                    carry, topology = (scattered, old.topology) if is_back else (gathered, new.topology)
                    expected = carry(tensor, topology) if tensor.numel() > 1 else tensor
                    if is_back and (start := STARTS.get((name, key.rpartition(".")[2]))):
                        there = carry(torch.ones_like(tensor), topology)
                        expected = expected + start * (1 - there)
                    off = STEPS.get(name, 0.0) * float(expected.abs().max())
                    torch.testing.assert_close(now[key], expected, rtol=0, atol=off)
            step()


def _sparser(model: nn.Module, optimizer: Optimizer, unit: tuple[int, int]) -> None:
    sparsify(model, 0.75, budget="uniform", unit=unit, sparsify_head=True, optimizer=optimizer)


def _kept(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    kept = {}
    for part in (optimizer, *inner):
        for key, value in part.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                plain = value.dequantize() if type(value) not in (Tensor, nn.Parameter) else value
                kept[f"{type(part).__name__}.{key}"] = plain.detach().clone()
    return kept


REFUSED = {
    *("LBFGS", "Adafactor", "Shampoo", "ScalableShampoo", "Kron", "AccSGD", "SOAP", "CAME", "AdaFactor", "SM3"),
    *("transformers Adafactor", "transformers Adafactor, relative"),
    *("ZeroRedundancyOptimizer", "ZeroRedundancyOptimizer, buckets"),
}


def test_what_is_refused_leaves_everything_as_it_was() -> None:
    model = dense()
    optimizer = MADE["adamw"](list(model.parameters()))
    train(model, optimizer, range(3))
    part = torch.optim.SGD([p for n, p in model.named_parameters() if n != "2.weight"], lr=0.1)
    before = list(model), [list(g["params"]) for g in optimizer.param_groups], dict(optimizer.state)

    def refused(match: str, **settings: Any) -> None:
        for convert in (lambda **s: sparsify(model, 0.5, **s), lambda **s: densify(model, **s)):
            if convert.__code__.co_names[0] == "densify" and not isinstance(settings["optimizer"], str):
                continue
            with pytest.raises(InputError, match=match) as caught:
                convert(**settings)
            assert "\n" not in str(caught.value)
        assert (list(model), [list(g["params"]) for g in optimizer.param_groups], dict(optimizer.state)) == before

    refused("optimizer: must be a torch optimizer, not 'adamw'", optimizer="adamw")
    refused("the optimizer does not have the parameter of 2: give the one that trains the model", optimizer=part)
    refused("an initializer draws new values", optimizer=optimizer, initializer=lambda name, topology, rng: None)
    with pytest.raises(
        InputError, match="start: must be 'random', 'magnitude', 'nonzero' or masks by name, not 'largest'"
    ):
        sparsify(model, 0.5, start="largest")  # type: ignore[arg-type]
    model[2].weight.requires_grad_(False)
    sparsify(model, 0.5, optimizer=part)
    assert not model[2].values.requires_grad


def test_layers_that_share_their_values_have_no_common_successor() -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)
    model[2].values = model[0].values
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="layers 0 and 2 share their parameter"):
        densify(model, optimizer=optimizer)
    assert len(sparse_layers(model)) == 3


def test_names_that_an_optimizer_knows_follow() -> None:
    model = dense()
    optimizer = torch.optim.AdamW(model.named_parameters())
    names = optimizer.param_groups[0]["param_names"]
    before = list(names)
    sparsify(model, 0.8, exclude=["4"], optimizer=optimizer)
    assert names == [n.replace("0.weight", "0.values").replace("2.weight", "2.values") for n in before]
    densify(model, optimizer=optimizer)
    assert names == before == [name for name, _ in dense().named_parameters()]


@pytest.mark.parametrize("unit", [(1, 1), (2, 3)])
@given(st.integers(0, 2**20), st.integers(1, 23), st.booleans())
def test_magnitude_keeps_the_largest_and_the_first_of_equal_ones(
    unit: tuple[int, int], seed: int, count: int, coarse: bool
) -> None:
    weight = torch.randn(6 * unit[0], 4 * unit[1], generator=generator(seed))
    if coarse:
        weight = weight.sign() * (weight.abs() > 0.5)
    topology = strongest(weight, count, unit)
    blocks = weight.view(6, unit[0], 4, unit[1]).square().sum((1, 3)).T.reshape(-1)
    order = sorted(range(24), key=lambda i: (-float(blocks[i]), i))
    if unit == (1, 1) or coarse:
        assert topology.indices.tolist() == sorted(order[:count])
    least = float(blocks[topology.indices.long()].min())
    assert least >= float(blocks[order[count]]) * (1 - 1e-5)
    assert torch.equal(scattered(gathered(weight, topology), topology), weight * topology.to_mask())


def test_magnitude_within_heads_and_neurons() -> None:
    heads = {"0": HeadLayout("out", 8)}
    for settings in ({"heads": heads, "head_min_density": 0.2}, {"fan_in": (1.0, 1.0)}, {"fan_out": (0.5, 1.5)}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        with torch.no_grad():
            model[0].weight[:8] *= 1e-3  # by size alone the first head, and the first rows, would have nothing
        weight = model[0].weight.detach().clone()
        sparsify(model, 0.7, start="magnitude", budget="uniform", **settings)  # type: ignore[arg-type]
        topology = sparse_layers(model)["0"].topology
        mask = topology.to_mask()
        assert topology.count == round(0.3 * 512)
        if "heads" in settings:
            assert int(mask[:8].sum()) == math.ceil(0.2 * 128)
            assert float(weight[:8][mask[:8]].abs().min()) >= float(weight[:8][~mask[:8]].abs().max())
        elif "fan_in" in settings:
            assert set(mask.sum(1).tolist()) <= {4, 5}
        else:
            assert int(mask.sum(0).min()) >= 4
            assert int(mask.sum(0).max()) <= 15
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(InputError, match="start 'magnitude' obeys one of head_min_density, fan_in and fan_out"):
        sparsify(model, 0.7, start="magnitude", fan_in=(0.5, 1.5), fan_out=(0.5, 1.5))
    assert not sparse_layers(model)
