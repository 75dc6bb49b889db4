"""Surgery: nnz exact, everything remapped, and nothing of a dropped connection left anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology, remap, sample_distinct
from sparsae.nn.linear import SparseLinear
from sparsae.search.teacher.storages import Union
from sparsae.surgery import kaiming_uniform, prepare_swap
from tests.core.test_topology import assert_valid
from tests.support.strategies import topologies

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def layers_of(topology: Topology, other: Topology, seed: int = 0) -> dict[str, SparseLinear]:
    rng = generator(seed, "values")
    return {
        name: SparseLinear(t, torch.randn(t.values_shape, generator=rng) + 3.0)
        for name, t in (("a", topology), ("b", other))
    }


def random_swap(layers: dict[str, SparseLinear], seed: int) -> Swap:
    """Units of the first layer are dropped; as many are grown in either."""
    rng = generator(seed, "swap")
    a, b = layers["a"].topology, layers["b"].topology
    room = min(a.units - a.count, b.units - b.count)
    n = min(a.count, b.count, room) // 2
    drop = {"a": a.indices[sample_distinct(a.count, 2 * n, rng)] if 2 * n <= a.count else a.indices[:0]}
    n = drop["a"].numel() // 2
    return Swap(drop, {"a": a.sample_inactive(n, rng), "b": b.sample_inactive(drop["a"].numel() - n, rng)})


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(topologies(), st.integers(0, 2**32))
def test_values_and_optimizer_state_follow(name: str, topology: Topology, seed: int) -> None:
    layers = layers_of(topology, topology)
    optimizer = OPTIMIZERS[name]([layer.values for layer in layers.values()])
    for layer in layers.values():
        layer.values.grad = torch.randn(layer.values.shape, generator=generator(seed, "grad"))
    optimizer.step()
    before = {n: (layer.topology, layer.values.detach().clone()) for n, layer in layers.items()}
    states = {
        n: {k: v.clone() for k, v in optimizer.state[layer.values].items() if isinstance(v, torch.Tensor) and v.dim()}
        for n, layer in layers.items()
    }
    swap = random_swap(layers, seed)
    made = prepare_swap(layers, swap, "zero", generator(seed))
    made.commit(optimizer)
    assert sum(layer.topology.count for layer in layers.values()) == 2 * topology.count
    for n, layer in layers.items():
        old, values = before[n]
        assert_valid(layer.topology)
        assert layer.values.grad is None
        assert layer.values.shape == layer.topology.values_shape
        was_active = old.contains(layer.topology.indices)
        if was_active.any():
            at = old.positions(layer.topology.indices[was_active])
            assert torch.equal(layer.values.detach()[was_active], values[at])
        assert not layer.values.detach()[~was_active].any()
        for key, state in states[n].items():
            now = optimizer.state[layer.values][key]
            assert now.shape[0] == layer.topology.count
            assert not now[~was_active].any()
            if was_active.any():
                assert torch.equal(now[was_active], state[at])
    for layer in layers.values():
        layer.values.grad = torch.ones_like(layer.values)
    optimizer.step()


@given(topologies(), st.integers(0, 2**32))
def test_preview_leaves_no_trace(topology: Topology, seed: int) -> None:
    layers = layers_of(topology, topology)
    before = {n: (layer.topology, layer.values.data, layer.values.detach().clone()) for n, layer in layers.items()}
    made = prepare_swap(layers, random_swap(layers, seed), "kaiming_uniform", generator(seed))
    with made.preview():
        for name, change in made.changes.items():
            assert layers[name].topology is change.after
            assert torch.equal(layers[name].values.detach(), change.values)
    for name, layer in layers.items():
        assert layer.topology is before[name][0]
        assert layer.values.data.data_ptr() == before[name][1].data_ptr()
        assert torch.equal(layer.values.detach(), before[name][2])


def test_a_preview_that_fails_is_undone() -> None:
    topology = Topology.random((6, 6), 12, generator(0))
    layers = layers_of(topology, topology)
    made = prepare_swap(layers, random_swap(layers, 1), "zero", generator(0))
    with pytest.raises(RuntimeError, match="loss"), made.preview():
        raise RuntimeError("loss")
    assert layers["a"].topology is topology


def test_kaiming_uniform_has_the_bound_of_the_active_fan_in() -> None:
    topology = Topology.random((40, 4000), 16_000, generator(0, "fan"))
    values = kaiming_uniform(topology, generator(1, "fan"))
    fan_in = torch.bincount(topology.rows.long(), minlength=40)
    for row in range(40):
        mine = values[topology.rows == row]
        bound = (6.0 / float(fan_in[row])) ** 0.5
        assert float(mine.abs().max()) <= bound
        assert float(mine.abs().max()) > 0.95 * bound
        assert abs(float(mine.mean())) < 0.2 * bound


def test_blocks_count_their_width_as_fan_in() -> None:
    topology = Topology.from_indices((8, 16), torch.tensor([0, 2, 5]), (4, 4))
    values = kaiming_uniform(topology, generator(0, "blocks"))
    assert values.shape == (3, 4, 4)
    two, one = (6 / 8) ** 0.5, (6 / 4) ** 0.5
    assert float(values[topology.rows == 0].abs().max()) <= two
    assert float(values[topology.rows == 1].abs().max()) <= one


def test_factored_state_over_blocks_follows() -> None:
    topology = Topology.random((16, 16), 6, generator(0), (4, 4))
    layers = {"a": SparseLinear(topology, torch.randn(topology.values_shape))}
    optimizer = torch.optim.Adafactor([layers["a"].values], lr=0.1)
    layers["a"].values.grad = torch.ones_like(layers["a"].values)
    optimizer.step()
    grow = topology.sample_inactive(2, generator(1))
    made = prepare_swap(layers, Swap({"a": topology.indices[[0, 3]]}, {"a": grow}), "zero", generator(0))
    made.commit(optimizer)
    grown = made.changes["a"].grown
    state = optimizer.state[layers["a"].values]
    assert state["row_var"].shape == (6, 4, 1)
    for key in ("row_var", "col_var"):
        assert not state[key][grown].any()
        assert state[key][~grown].all()


def test_no_index_tensor_is_kept_beside_the_indices() -> None:
    topology = Topology.random((16, 16), 6, generator(0), (4, 4))
    assert topology.rows.numel() == topology.columns.numel() == 6
    assert vars(topology).keys() == {"shape", "indices", "unit", "_views"}
    assert not topology._views


def test_swaps_that_do_not_hold_are_refused() -> None:
    topology = Topology.from_indices((3, 3), torch.tensor([0, 4]))
    layers = layers_of(topology, topology)
    one, empty = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match="nnz would change"):
        prepare_swap(layers, Swap({"a": one}, {"a": empty}), "zero", generator(0))
    with pytest.raises(ValueError, match="active"):
        prepare_swap(layers, Swap({"a": torch.tensor([1])}, {"a": torch.tensor([2])}), "zero", generator(0))
    with pytest.raises(ValueError, match="active"):
        prepare_swap(layers, Swap({"a": one}, {"a": one}), "zero", generator(0))
    with pytest.raises(ValueError, match="unknown initialization"):
        prepare_swap(layers, Swap({"a": one}, {"a": torch.tensor([2])}), "ones", generator(0))


def test_remap_of_nothing() -> None:
    assert torch.equal(remap(torch.zeros(0), torch.tensor([-1, -1])), torch.zeros(2))


def test_union_teacher_forgets_what_has_faded_and_keeps_the_rest() -> None:
    topology = Topology.from_indices((2, 3), torch.tensor([0, 1, 2]))
    student = {"a": SparseLinear(topology, torch.ones(3))}
    teacher = Union("a", SparseLinear(topology, torch.tensor([0.5, 1e-9, 0.25])), tolerance=1e-6)
    swap = Swap({"a": torch.tensor([0, 1])}, {"a": torch.tensor([4, 5])})
    prepare_swap(student, swap, "zero", generator(0)).commit(None, {"a": teacher})
    module = teacher.module
    # Unit 1 had faded and is deleted; unit 0 is remembered though the student dropped it.
    assert module.topology.indices.tolist() == [0, 2, 4, 5]
    assert module.values.tolist() == [0.5, 0.25, 0.0, 0.0]
    assert teacher.active is not None
    assert teacher.active.tolist() == [False, True, True, True]
