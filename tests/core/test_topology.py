"""Invariants of topologies: exact counts, sorted unique indices in range, and no memory of the grid's size."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology, _sample_by_mark, _sample_by_sort, index_dtype, sample_distinct
from tests.support.strategies import topologies


def assert_valid(topology: Topology) -> None:
    indices = topology.indices
    assert indices.dtype == torch.int32
    assert bool((indices[1:] > indices[:-1]).all())
    if indices.numel():
        assert int(indices[0]) >= 0
        assert int(indices[-1]) < topology.units


@given(topologies(), st.data())
def test_replace_keeps_the_invariants_and_maps_every_unit(topology: Topology, data: st.DataObject) -> None:
    rng = generator(data.draw(st.integers(0, 2**32)), "replace")
    drop = topology.indices[sample_distinct(topology.count, data.draw(st.integers(0, topology.count)), rng)]
    inactive = topology.units - topology.count
    grow = topology.sample_inactive(data.draw(st.integers(0, inactive)), rng)
    after, source = topology.replace(drop, grow)
    assert_valid(after)
    assert after.count == topology.count - drop.numel() + grow.numel()
    kept = source >= 0
    assert torch.equal(after.indices[kept], topology.indices[source[kept]])
    assert torch.equal(after.indices[~kept], grow)
    expected = set(topology.indices.tolist()) - set(drop.tolist()) | set(grow.tolist())
    assert set(after.indices.tolist()) == expected


@given(topologies())
def test_mask_agrees_with_the_indices(topology: Topology) -> None:
    mask = topology.to_mask()
    assert mask.shape == topology.shape
    assert int(mask.sum()) == topology.nnz
    b_out, b_in = topology.unit
    for row, column in zip(topology.rows.tolist(), topology.columns.tolist(), strict=True):
        assert bool(mask[row * b_out : (row + 1) * b_out, column * b_in : (column + 1) * b_in].all())


@given(topologies(), st.integers(0, 2**32))
def test_inactive_units_are_inactive_and_distinct(topology: Topology, seed: int) -> None:
    n = (topology.units - topology.count) // 2
    drawn = topology.sample_inactive(n, generator(seed, "inactive"))
    assert drawn.numel() == n
    assert bool((drawn[1:] > drawn[:-1]).all())
    assert not bool(topology.contains(drawn).any())


def test_every_inactive_unit_has_one_rank() -> None:
    topology = Topology.random((7, 9), 20, generator(1, "ranks"))
    everything = topology.inactive_at(torch.arange(43))
    assert sorted([*everything.tolist(), *topology.indices.tolist()]) == list(range(63))


def test_inactive_units_are_drawn_uniformly() -> None:
    topology = Topology.from_indices((5, 4), torch.tensor([0, 1, 2, 7, 19]))
    hits = torch.zeros(20)
    rng = generator(3, "uniform")
    for _ in range(4000):
        hits[topology.sample_inactive(3, rng).long()] += 1
    assert hits[[0, 1, 2, 7, 19]].sum() == 0
    expected = 4000 * 3 / 15
    inactive = hits[hits > 0]
    assert inactive.numel() == 15
    # Binomial deviation of each count is 25; five of them.
    assert float((inactive - expected).abs().max()) < 5 * 25


@given(st.integers(1, 10**12), st.integers(0, 200), st.integers(0, 2**32))
def test_distinct_draws(population: int, n: int, seed: int) -> None:
    n = min(n, population)
    drawn = sample_distinct(population, n, generator(seed, "distinct"))
    assert drawn.numel() == n
    assert bool((drawn[1:] > drawn[:-1]).all())
    assert not n or (int(drawn[0]) >= 0 and int(drawn[-1]) < population)


@given(population=st.integers(1, 5000), n=st.integers(0, 1000), seed=st.integers(0, 10))
def test_draws_by_mark_and_by_sort_are_the_same(population: int, n: int, seed: int) -> None:
    n = min(n, population // 2)
    one, other = generator(seed), generator(seed)
    assert torch.equal(_sample_by_mark(population, n, one), _sample_by_sort(population, n, other))
    assert torch.equal(one.get_state(), other.get_state())


def test_a_huge_grid_costs_only_its_active_units() -> None:
    tracemalloc.start()
    topology = Topology.random((200_000, 200_000), 1000, generator(0, "huge"))
    assert topology.indices.dtype == torch.int64
    grown = topology.sample_inactive(500, generator(1, "huge"))
    after, _ = topology.replace(topology.indices[:500], grown)
    assert after.count == 1000
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_index_width_follows_the_grid() -> None:
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 12], "must lie in"), ([-1], "must lie in"), ([3, 3], "unique")],
)
def test_bad_indices_are_refused(indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology.from_indices((3, 4), torch.tensor(indices))


def test_a_unit_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        Topology.random((10, 8), 1, generator(0), (4, 4))


@pytest.mark.parametrize("unit", [-1, 64, 2**32 + 3, 2**40])
def test_what_is_no_unit_is_not_active(unit: int) -> None:
    topology = Topology.from_indices((8, 8), torch.tensor([0, 3, 63]))
    assert topology.contains(torch.tensor([unit, 3])).tolist() == [False, True]
    with pytest.raises(ValueError, match="active"):
        topology.positions(torch.tensor([3, unit]))


def test_units_of_either_width_are_found_in_a_layer_of_many() -> None:
    topology = Topology.from_indices((65536, 65536), torch.tensor([0, 5, 2**32 - 1]))
    for dtype in (torch.int32, torch.int64):
        assert topology.contains(torch.tensor([0, 4, 5], dtype=dtype)).tolist() == [True, False, True]
        assert topology.positions(torch.tensor([5, 0], dtype=dtype)).tolist() == [1, 0]


def test_impossible_swaps_are_refused() -> None:
    topology = Topology.from_indices((3, 3), torch.tensor([0, 4]))
    empty = topology.indices[:0]
    with pytest.raises(ValueError, match="active"):
        topology.replace(empty, torch.tensor([4]))
    with pytest.raises(ValueError, match="active"):
        topology.replace(torch.tensor([1]), empty)
    with pytest.raises(ValueError, match="twice"):
        topology.replace(torch.tensor([4, 4]), empty)
    with pytest.raises(ValueError, match="twice"):
        topology.replace(empty, torch.tensor([1, 1]))
