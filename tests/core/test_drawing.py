"""Random units within groups: exact counts, distinct, uniform, and never a grid."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.core.drawing import evened, sample_from_each, sample_in_groups
from sparsae.core.groups import Groups
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(GRIDS, st.sampled_from(["in", "out"]), st.data())
def test_every_line_is_inside_its_limits_and_the_other_lines_are_as_they_were(
    grid: tuple[int, int], fan: Literal["in", "out"], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, grid[0] * grid[1]))
    topology = Topology.random(grid, count, generator(data.draw(st.integers(0, 99)), "test"))
    share = (data.draw(st.floats(0, 1)), data.draw(st.floats(1, 3)))
    groups = Groups.of_neurons(grid, fan, share, count)
    others = Groups.of_neurons(grid, "out" if fan == "in" else "in", share, count)
    after = evened(topology, fan, groups.least, groups.most, generator(0, "evened"))
    Topology.from_indices(grid, after.indices)  # in range, distinct
    assert after.indices.equal(after.indices.sort().values)
    assert after.indices.dtype == topology.indices.dtype
    counts = groups.counts(after.indices)
    assert bool(((groups.least <= counts) & (counts <= groups.most)).all())
    assert others.counts(after.indices).equal(others.counts(topology.indices))
    if bool(((groups.counts(topology.indices) - counts) == 0).all()):
        assert after.indices.equal(topology.indices)


@given(GRIDS, st.data())
def test_rows_and_columns_can_both_be_constant(grid: tuple[int, int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, grid[0] * grid[1]))
    topology = Topology.random(grid, count, generator(data.draw(st.integers(0, 99)), "test"))
    rows, columns = (Groups.of_neurons(grid, fan, (1.0, 1.0), count) for fan in ("in", "out"))
    rng = generator(1, "evened")
    after = evened(evened(topology, "in", rows.least, rows.most, rng), "out", columns.least, columns.most, rng)
    assert after.count == count
    for groups in (rows, columns):
        counts = groups.counts(after.indices)
        assert int(counts.max()) - int(counts.min()) <= 1


def test_no_more_units_move_than_have_to() -> None:
    topology = Topology.random((64, 256), 1024, generator(0, "test"))
    before = torch.bincount(topology.rows.long(), minlength=64)
    after = evened(topology, "in", 16, 16, generator(0, "evened"))
    assert int((~after.contains(topology.indices)).sum()) == int((before - 16).clamp(min=0).sum())


def test_limits_that_the_mean_is_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="10 units are not between 3 and 5 for each of 4"):
        evened(Topology.random((4, 6), 10, generator(0, "test")), "in", 3, 5, generator(0, "evened"))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), min_size=1, max_size=6))
def test_so_many_come_from_each_range(ranges: list[tuple[int, float]]) -> None:
    sizes = torch.tensor([size for size, _ in ranges])
    counts = torch.tensor([round(share * size) for size, share in ranges])
    numbers = sample_from_each(sizes, counts, generator(0, "test"))
    assert numbers.equal(numbers.unique())
    owner = torch.arange(len(ranges)).repeat_interleave(sizes)[numbers]
    assert torch.bincount(owner, minlength=len(ranges)).equal(counts)


def test_every_number_of_a_range_is_as_likely_as_another() -> None:
    sizes, counts, rng = torch.tensor([5, 8]), torch.tensor([4, 2]), generator(0, "test")
    times = torch.zeros(13)
    for _ in range(1500):
        times[sample_from_each(sizes, counts, rng)] += 1
    expected = torch.tensor([4 / 5] * 5 + [2 / 8] * 8) * 1500
    # Five deviations of a binomial count.
    assert bool(((times - expected).abs() < 5 * (expected * (1 - expected / 1500)).sqrt()).all())


@given(GRIDS, st.data())
def test_what_is_taken_is_not_drawn_and_each_group_gets_its_share(grid: tuple[int, int], data: st.DataObject) -> None:
    units = grid[0] * grid[1]
    taken = Topology.random(grid, data.draw(st.integers(0, units)), generator(3, "test")).indices
    tile = data.draw(st.sampled_from([(1, grid[1]), (grid[0], 1), grid]))
    groups = Groups(grid, tile, 0, tile[0] * tile[1])
    counts = torch.tensor([data.draw(st.integers(0, groups.size)) for _ in range(groups.count)])
    drawn = sample_in_groups(groups, taken[torch.randperm(taken.numel(), generator=generator(4))], counts, generator(5))
    assert not bool(torch.isin(drawn, taken).any())
    assert groups.counts(drawn).equal(torch.minimum(counts, groups.size - groups.counts(taken)))
    assert groups.units(groups.place(drawn)).equal(drawn)


def test_memory_goes_with_what_is_active_and_not_with_the_grid() -> None:
    # A grid of 10^12 units, of which 100,000 are active: nothing of its size could exist.
    topology = Topology.random((10**6, 10**6), 10**5, generator(0, "test"))
    groups = Groups.of_neurons(topology.grid, "in", (0.0, 10.0), topology.count)
    after = evened(topology, "in", 0, groups.most, generator(1, "test"))
    drawn = sample_in_groups(groups, after.indices, torch.ones(10**6, dtype=torch.int64), generator(2, "test"))
    assert int(groups.counts(after.indices).max()) <= groups.most
    assert drawn.numel() == 10**6
