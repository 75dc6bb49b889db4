"""Every optimizer that people use, over ten swaps: kept state is kept, new state is zero, or it is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology, sample_distinct
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.rules import RiglConfig, SetConfig, StaticConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.surgery import prepare_swap
from tests.support.optimizers import REFUSED, STARTS, STEPS, TORCH, UNITS, VARIANTS, WEIGHT_COPIES

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step, for every shape anew: what is tested here is the state."""
    with torch.compiler.set_stance("force_eager"):
        yield


def model_of(unit: tuple[int, int]) -> nn.Sequential:
    """5,120 and 7,680 sparse weights: torchao quantizes from 4,096 on. No number of units is the side of a block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 160), nn.GELU(), nn.Linear(160, 192))
    sparsify(model, 0.75, budget="uniform", unit=unit, seed=1)
    return model


def states(optimizer: torch.optim.Optimizer, layer: SparseLinear) -> dict[str, Any]:
    """What an optimizer and the one inside it keep of a layer."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    return {
        f"{type(part).__name__}.{key}": value
        for part in [optimizer, *inner]
        for key, value in part.state.get(layer.values, {}).items()
    }


def floats(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value.dequantize() if type(value) is not Tensor else value).detach().clone()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, step: int) -> None:
    x = torch.randn(8, 128, generator=generator(step, "x"))
    optimizer.zero_grad()
    (model(x) - 1.0).square().mean().backward()
    sparsifier.before_step()
    optimizer.step()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", [*TORCH, *VARIANTS])
def test_state_follows_ten_swaps_or_the_optimizer_is_refused(
    name: str, unit: str, group: None, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = refusal_of(name, UNITS[unit])
    if name in TORCH and name not in (*KNOWN, *REFUSED[unit]):
        # One that torch has added since.
        assert refusal is None or name in refusal
    elif name in REFUSED[unit]:
        assert refusal is not None
        assert REFUSED[unit][name] in refusal
    else:
        assert refusal is None
    assert not any("another optimizer" in record.message for record in caplog.records)


def refusal_of(name: str, unit: tuple[int, int]) -> str | None:
    """Ten swaps whose state is looked at; or what the optimizer or the Sparsifier says against them."""
    model = model_of(unit)
    layers = sparse_layers(model)
    try:
        optimizer = (TORCH | VARIANTS)[name](list(model.parameters()))
        sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=SetConfig(every=1, stop=1.0)))
        for step in range(10):
            train_step(model, optimizer, sparsifier, step)
            before = {n: {key: floats(v) for key, v in states(optimizer, s).items()} for n, s in layers.items()}
            counts = {n: layer.topology.count for n, layer in layers.items()}
            update = sparsifier.after_step()
            assert update is not None
            assert update.accepted
            for n, change in update.changes.items():
                now = states(optimizer, layers[n])
                assert now.keys() == before[n].keys()
                for key, value in now.items():
                    holds(name, key, before[n][key], floats(value), change, counts[n], layers[n].values.detach())
    except (InputError, ValueError) as refusal:
        return str(refusal)
    assert any(states(optimizer, layer) for layer in layers.values()) or name == "SGD"
    return None


KNOWN = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
    *("Rprop", "SGD"),
)


def holds(name: str, key: str, before: Any, now: Any, change: Any, count: int, values: Tensor) -> None:
    """One entry of the state after a swap against the same before it."""
    if not isinstance(before, Tensor) or before.dim() == 0 or before.shape[0] != count:
        assert not isinstance(before, Tensor) or count not in before.shape
        torch.testing.assert_close(now, before, rtol=0, atol=0)
        return
    assert now.shape == (change.after.count, *before.shape[1:])
    kept, new = now[~change.grown], now[change.grown]
    was = before[change.source[~change.grown]]
    off = STEPS.get(name, 0.0) * float(was.abs().max())
    torch.testing.assert_close(kept, was, rtol=0, atol=off)
    if key.rpartition(".")[2] in WEIGHT_COPIES:
        assert torch.equal(new, values[change.grown])
    else:
        assert float((new - STARTS.get((name, key.rpartition(".")[2]), 0.0)).abs().max()) <= off
    assert new.numel()


class Keeping(torch.optim.SGD):
    """An optimizer with a state of the given kind beside its momentum."""

    def __init__(self, parameters: Any, keep: Callable[[Tensor], Any], key: str = "kept") -> None:
        super().__init__(parameters, lr=0.01, momentum=0.9)
        self.keep, self.key = keep, key

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault(self.key, self.keep(p))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("what", "keep"),
    [
        ("pairs", lambda p: torch.zeros(p.shape[0], p.shape[0])),
        ("a flat vector", lambda p: torch.zeros(3 * p.numel() + 1)),
        ("the second side", lambda p: torch.zeros(2, p.shape[0])),
        ("a list", lambda p: [torch.zeros_like(p)]),
        ("nested", lambda p: {"a": (1, [torch.zeros_like(p)])}),
        ("an object", lambda p: object()),
        ("a copy of the weights", lambda p: p.detach().clone()),
        ("a nearly equal copy", lambda p: 1.01 * p.detach()),
    ],
)
def test_what_cannot_follow_is_refused_before_anything_moves(what: str, keep: Any, unit: str) -> None:
    model = model_of(UNITS[unit])
    optimizer = Keeping(model.parameters(), keep)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=SetConfig(every=1, stop=1.0)))
    before = {n: layer.topology for n, layer in sparse_layers(model).items()}
    train_step(model, optimizer, sparsifier, 0)
    with pytest.raises(InputError, match="Keeping cannot follow connections that move: its 'kept' of 0 "):
        sparsifier.after_step()
    assert all(layer.topology is before[n] for n, layer in sparse_layers(model).items())


def test_nothing_moves_where_the_state_of_one_layer_cannot_follow() -> None:
    """The first layer's state could: values, topology and state of both are as they were."""
    model = model_of((1, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=SetConfig(every=2, stop=1.0)))
    train_step(model, optimizer, sparsifier, 0)
    sparsifier.after_step()
    layers = sparse_layers(model)
    optimizer.state[layers["2"].values]["late"] = torch.zeros(3, 5)
    train_step(model, optimizer, sparsifier, 1)
    before = {n: (layer.topology, layer.values.data, dict(states(optimizer, layer))) for n, layer in layers.items()}
    with pytest.raises(InputError, match=r"its 'late' of 2 has shape \(3, 5\)"):
        sparsifier.after_step()
    for n, layer in layers.items():
        topology, values, state = before[n]
        assert layer.topology is topology
        assert layer.values.data_ptr() == values.data_ptr()
        assert all(value is state[key] for key, value in states(optimizer, layer).items())


@pytest.mark.parametrize("place", ["attribute", "group", "state"])
def test_tensors_that_nothing_names_are_refused(place: str) -> None:
    model = model_of((1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    own = {"nested": [torch.zeros_like(p) for p in model.parameters()]}
    if place == "attribute":
        optimizer.flat_buffers = own  # type: ignore[attr-defined]
    elif place == "group":
        optimizer.param_groups[0]["flat_buffers"] = own
    else:
        optimizer.state["flat_buffers"] = own  # type: ignore[index]
    config = SparsifierConfig(steps=20, topology=SetConfig(every=1))
    with pytest.raises(InputError, match=r"SGD cannot follow .* tensors of its own in 'flat_buffers'"):
        Sparsifier(model, optimizer, config)


def test_a_static_topology_takes_any_optimizer() -> None:
    model = model_of((1, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=3, topology=StaticConfig()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 128)) - 1.0).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
        sparsifier.after_step()
    assert closure().item() < 0.5 * first


def layer_of(count: int, unit: tuple[int, int]) -> SparseLinear:
    topology = Topology.random((16 * unit[0], 8 * unit[1]), count, generator(count), unit)
    return SparseLinear(topology, torch.randn(topology.values_shape, generator=generator(count)) + 3.0)


@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([(1, 1), (2, 4), (4, 4), (4, 2)]), st.integers(0, 2**20))
def test_factored_states_follow_whatever_the_shapes(first: int, second: int, unit: tuple[int, int], seed: int) -> None:
    """Rows, columns and means of blocks move along, in one layer or where the counts change; means over units stay.

    Where a layer has as many blocks as a block has sides, another layer tells; where none does, it is refused.
    """
    layers = {"a": layer_of(first, unit), "b": layer_of(second, unit)}
    optimizer = torch.optim.SGD([layer.values for layer in layers.values()], lr=0.1)
    kept: dict[str, Callable[[Tensor], Tensor]] = {"full": lambda v: v.clone(), "step": lambda v: torch.tensor(3.0)}
    if unit != (1, 1):
        kept |= {
            "row": lambda v: v.mean(2),
            "column": lambda v: v.mean(1),
            "row kept": lambda v: v.mean(2, keepdim=True),
            "one": lambda v: v.mean((1, 2)),
            "over units": lambda v: v.mean(0),
            "over units kept": lambda v: v.mean(0, keepdim=True),
            "side": lambda v: v.mean((0, 2), keepdim=True),
        }
    for layer in layers.values():
        optimizer.state[layer.values] = {key: reduce(layer.values.detach()) for key, reduce in kept.items()}
    before = {n: dict(optimizer.state[layer.values]) for n, layer in layers.items()}
    moves = {n: min(layer.topology.count, 128 - layer.topology.count) // 2 for n, layer in layers.items()}
    rng = generator(seed, "swap")
    drop = {n: layers[n].topology.indices[sample_distinct(layers[n].topology.count, k, rng)] for n, k in moves.items()}
    given_up = min(moves["a"], 128 - layers["b"].topology.count - moves["b"], moves["a"])
    grow = {
        "a": layers["a"].topology.sample_inactive(moves["a"] - given_up, rng),
        "b": layers["b"].topology.sample_inactive(moves["b"] + given_up, rng),
    }
    made = prepare_swap(layers, Swap(drop, grow), "zero", rng)
    if {first, second} <= {*unit} - {1}:
        with pytest.raises(InputError, match="whether it has a part for each block cannot be told"):
            made.commit(optimizer)
        return
    made.commit(optimizer)
    for n, layer in layers.items():
        change = made.changes[n]
        for key, now in optimizer.state[layer.values].items():
            was = before[n][key]
            if key in ("over units", "over units kept", "side", "step"):
                assert torch.equal(now, was)
                continue
            assert torch.equal(now[~change.grown], was[change.source[~change.grown]])
            assert not now[change.grown].any()
            assert now.shape == (layer.topology.count, *was.shape[1:])


@pytest.mark.parametrize(("count", "quantized"), [(4096 + 256, True), (4096 + 100, False), (4096 - 256, True)])
def test_quantized_state_follows_a_layer_whose_size_changes(count: int, quantized: bool) -> None:
    layers = {"a": layer_of_size(4096), "b": layer_of_size(6000)}
    optimizer = VARIANTS["AdamW8bit"]([layer.values for layer in layers.values()])
    for layer in layers.values():
        layer.values.grad = torch.randn(layer.values.shape, generator=generator(1))
    optimizer.step()
    state = optimizer.state[layers["a"].values]
    before = floats(state["exp_avg"])
    a, b, rng = layers["a"].topology, layers["b"].topology, generator(2)
    grown = count - 4096
    give, take = ("b", "a") if grown > 0 else ("a", "b")
    swap = Swap(
        {give: layers[give].topology.indices[: abs(grown)]},
        {take: layers[take].topology.sample_inactive(abs(grown), rng)},
    )
    made = prepare_swap(layers, swap, "zero", rng)
    made.commit(optimizer)
    assert (a.count, b.count) == (4096, 6000)
    now = optimizer.state[layers["a"].values]["exp_avg"]
    assert (type(now) is not Tensor) == quantized
    change = made.changes["a"]
    was = before[change.source[~change.grown]]
    torch.testing.assert_close(floats(now)[~change.grown], was, rtol=0, atol=float(was.abs().max()) / 64)
    for layer in layers.values():
        layer.values.grad = torch.ones_like(layer.values)
    optimizer.step()


def layer_of_size(count: int) -> SparseLinear:
    topology = Topology.random((160, 128), count, generator(count))
    return SparseLinear(topology, torch.randn(count, generator=generator(count)))


@pytest.mark.parametrize("name", ["sparsae.AdamW, a step a weight", "AdamW", "AdamW, fused"])
@pytest.mark.parametrize("unit", UNITS)
def test_parameters_in_bfloat16_learn_and_move(name: str, unit: str) -> None:
    model = model_of(UNITS[unit]).bfloat16()
    optimizer = (TORCH | VARIANTS)[name](list(model.parameters()))
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology=RiglConfig(every=5)))
    start = {n: layer.topology for n, layer in sparse_layers(model).items()}
    losses = []
    for _ in range(40):
        x = torch.randn(16, 128, generator=generator(3)).bfloat16()
        optimizer.zero_grad()
        loss = (model(x) - 1.0).float().square().mean()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    for n, layer in sparse_layers(model).items():
        assert layer.values.dtype == torch.bfloat16
        assert not torch.equal(layer.indices, start[n].indices)
        assert all(value.shape in (layer.values.shape, ()) for value in optimizer.state[layer.values].values())


def test_a_state_that_is_made_late_is_looked_at_before_connections_move() -> None:
    """The first step may have been skipped: a copy of the weights that comes with the second is found all the same."""
    model = model_of((1, 1))
    optimizer = Keeping(model.parameters(), lambda p: p.detach().clone())
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=SetConfig(every=3, stop=1.0)))
    (model(torch.ones(2, 128)) * float("inf")).sum().backward()
    sparsifier.before_step()
    sparsifier.after_step()
    train_step(model, optimizer, sparsifier, 1)
    sparsifier.after_step()
    train_step(model, optimizer, sparsifier, 2)
    with pytest.raises(InputError, match="its 'kept' of 0 looks like a copy of the weights"):
        sparsifier.after_step()


def test_weights_that_are_no_numbers_resemble_nothing() -> None:
    """A run that diverges says so itself; its optimizer is not blamed."""
    model = model_of((1, 1))
    optimizer = Keeping(model.parameters(), torch.zeros_like)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=SetConfig(every=2, stop=1.0)))
    train_step(model, optimizer, sparsifier, 0)
    with torch.no_grad():
        sparse_layers(model)["0"].values.fill_(float("inf"))
    sparsifier.after_step()
