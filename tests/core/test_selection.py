"""Groups and choices within them: exact for one partition, never outside the limits for several."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsae.core.groups import Groups, binding
from sparsae.core.heads import HeadLayout
from sparsae.core.randomness import generator
from sparsae.core.selection import Partition, exchange
from sparsae.core.topology import Topology

GRID = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Topology, Tensor]:
    """A small topology and some of its inactive units, sorted."""
    grid = draw(GRID)
    units = grid[0] * grid[1]
    topology = Topology.random(grid, draw(st.integers(0, units)), generator(draw(st.integers(0, 99)), "test"))
    inactive = topology.inactive_at(torch.arange(units - topology.count))
    return topology, inactive[torch.tensor([draw(st.booleans()) for _ in inactive], dtype=torch.bool)]


def scores(draw: st.DrawFn, n: int) -> Tensor:
    return torch.tensor([draw(st.sampled_from([0.0, 1.0, 2.0, 3.5])) for _ in range(n)])


@st.composite
def partitions(draw: st.DrawFn, grid: tuple[int, int]) -> Groups:
    """Rows, columns, bands of either, or the whole, with limits that the layer may or may not be inside."""
    tiles = [(1, grid[1]), (grid[0], 1), grid]
    tiles += [(2, grid[1])] if grid[0] % 2 == 0 else []
    tiles += [(grid[0], 3)] if grid[1] % 3 == 0 else []
    tile = draw(st.sampled_from(tiles))
    least = draw(st.integers(0, tile[0] * tile[1]))
    return Groups(grid, tile, least, draw(st.integers(least, tile[0] * tile[1])))


def holds(groups: Groups, before: Tensor, after: Tensor) -> bool:
    """Whether all groups are inside their limits afterwards, or no farther from them than they were."""
    old, new = groups.counts(before), groups.counts(after)
    low, high = old.clamp(max=groups.least), old.clamp(min=groups.most)
    return bool(((low <= new) & (new <= high)).all())


def swapped(topology: Topology, dropped: Tensor, grow: Tensor) -> Tensor:
    return topology.replace(topology.indices[dropped], grow)[0].indices


def best(order: list[int], n: int, group: list[int], least: list[int], most: list[int]) -> list[int]:
    """The naive twin of `select`, over positions in the order of their scores."""
    taken: list[int] = []
    for g, low in enumerate(least):
        taken += [i for i in order if group[i] == g][:low]
    for i in order:
        if len(taken) < n and i not in taken and sum(group[j] == group[i] for j in taken) < most[group[i]]:
            taken.append(i)
    return sorted(taken)


def naive(
    drop_scores: Tensor, grow_scores: Tensor, n: int, partition: Partition, back: list[int] | None
) -> tuple[list[int], ...]:
    """One partition: what is dropped is the best that can be made up for; then what is grown is the best that fits."""
    assert isinstance(partition.active, Tensor)
    assert isinstance(partition.candidates, Tensor)
    group, other = partition.active.tolist(), partition.candidates.tolist()
    slack, room = partition.slack.tolist(), partition.room.tolist()
    out = sorted(range(len(group)), key=lambda i: (drop_scores[i], i))
    into = sorted(range(len(other)), key=lambda i: (grow_scores[i], i))
    limits = [low + other.count(g) for g, low in enumerate(slack)]
    for size in range(min(n, len(group)), -1, -1):
        dropped = best(out, size, group, [0] * len(slack), limits)
        open_ = [i for i in into if back is None or back[i] < 0 or back[i] in dropped]
        lost = [sum(group[i] == g for i in dropped) for g in range(len(slack))]
        most = [min(r + d, sum(other[i] == g for i in open_)) for g, (r, d) in enumerate(zip(room, lost, strict=True))]
        if len(dropped) == size and sum(most) >= size:
            least = [max(0, d - s) for d, s in zip(lost, slack, strict=True)]
            return dropped, best(open_, size, other, least, most)
    raise AssertionError


@given(layers(), st.data())
def test_one_partition_is_obeyed_exactly(layer: tuple[Topology, Tensor], data: st.DataObject) -> None:
    topology, candidates = layer
    groups = data.draw(partitions(topology.grid))
    drop_scores, grow_scores = scores(data.draw, topology.count), scores(data.draw, candidates.numel())
    n = data.draw(st.integers(0, topology.count))
    partition = Partition.of(groups, topology.indices, candidates)
    dropped, grown = exchange(drop_scores, grow_scores, n, [partition])
    assert (dropped.tolist(), grown.tolist()) == naive(drop_scores, grow_scores, n, partition, None)
    assert holds(groups, topology.indices, swapped(topology, dropped, candidates[grown]))
    if groups.tile == groups.grid and topology.count <= groups.most:
        assert dropped.numel() == min(n, candidates.numel())


@given(layers(), st.data())
def test_what_is_dropped_is_the_least_of_all_that_could_be_made_up_for(
    layer: tuple[Topology, Tensor], data: st.DataObject
) -> None:
    topology, candidates = layer
    groups = data.draw(partitions(topology.grid))
    drop_scores = scores(data.draw, topology.count)
    n = data.draw(st.integers(0, min(4, topology.count)))
    partition = Partition.of(groups, topology.indices, candidates)
    dropped, _ = exchange(drop_scores, scores(data.draw, candidates.numel()), n, [partition])
    assert isinstance(partition.active, Tensor)
    limits = partition.slack + groups.counts(candidates)
    sums = [
        float(drop_scores[list(some)].sum())
        for some in itertools.islice(itertools.combinations(range(topology.count), dropped.numel()), 3000)
        if bool((groups.counts(topology.indices[list(some)]) <= limits).all())
    ]
    assert float(drop_scores[dropped].sum()) <= min(sums) + 1e-6


@given(layers(), st.data())
def test_what_is_dropped_may_be_grown_again(layer: tuple[Topology, Tensor], data: st.DataObject) -> None:
    topology, candidates = layer
    groups = data.draw(partitions(topology.grid))
    units, order = torch.cat([candidates, topology.indices]).sort()
    back = torch.cat([torch.full((candidates.numel(),), -1), torch.arange(topology.count)])[order]
    drop_scores, grow_scores = scores(data.draw, topology.count), scores(data.draw, units.numel())
    n = data.draw(st.integers(0, topology.count))
    partition = Partition.of(groups, topology.indices, units)
    dropped, grown = exchange(drop_scores, grow_scores, n, [partition], back)
    assert (dropped.tolist(), grown.tolist()) == naive(drop_scores, grow_scores, n, partition, back.tolist())
    assert dropped.numel() == n  # whatever is dropped could be grown again
    stays = back[grown][back[grown] >= 0]
    leaves = dropped[~torch.isin(dropped, stays)]
    assert holds(groups, topology.indices, swapped(topology, leaves, units[grown[back[grown] < 0]]))


@given(layers(), st.data(), st.booleans())
def test_several_partitions_are_never_left(
    layer: tuple[Topology, Tensor], data: st.DataObject, returning: bool
) -> None:
    topology, candidates = layer
    several = data.draw(st.lists(partitions(topology.grid), min_size=2, max_size=3))
    units, order = torch.cat([candidates, topology.indices if returning else candidates[:0]]).sort()
    back = (
        torch.cat([torch.full((candidates.numel(),), -1), torch.arange(topology.count)])[order] if returning else None
    )
    drop_scores, grow_scores = scores(data.draw, topology.count), scores(data.draw, units.numel())
    n = data.draw(st.integers(0, topology.count))
    dropped, grown = exchange(
        drop_scores, grow_scores, n, [Partition.of(g, topology.indices, units) for g in several], back
    )
    assert dropped.numel() == grown.numel() <= n
    if back is not None:
        assert bool(torch.isin(back[grown][back[grown] >= 0], dropped).all())
        dropped = dropped[~torch.isin(dropped, back[grown])]
        grown = grown[back[grown] < 0]
    after = swapped(topology, dropped, units[grown])
    assert all(holds(groups, topology.indices, after) for groups in several)


@given(layers(), st.data())
def test_partitions_that_exclude_nothing_change_nothing(layer: tuple[Topology, Tensor], data: st.DataObject) -> None:
    topology, candidates = layer
    rows, columns = topology.grid
    free = [Groups(topology.grid, tile, 0, tile[0] * tile[1]) for tile in [(1, columns), (rows, 1), topology.grid]]
    drop_scores, grow_scores = scores(data.draw, topology.count), scores(data.draw, candidates.numel())
    n = data.draw(st.integers(0, topology.count))
    fewest = min(n, candidates.numel())
    dropped, grown = exchange(
        drop_scores, grow_scores, n, [Partition.of(g, topology.indices, candidates) for g in free]
    )
    assert dropped.tolist() == drop_scores.sort(stable=True).indices[:fewest].sort().values.tolist()
    assert grown.tolist() == grow_scores.sort(stable=True).indices[:fewest].sort().values.tolist()


def test_rows_stay_constant_while_columns_keep_within_bounds() -> None:
    # 12 x 12 with three a row, four at most a column: one partition exactly, the other with caution.
    units = torch.tensor([c * 12 + r for r in range(12) for c in (r, (r + 1) % 12, (r + 5) % 12)])
    topology = Topology.from_indices((12, 12), units)
    candidates = topology.inactive_at(torch.arange(144 - 36))
    rng = generator(0, "test")
    rows, columns = Groups((12, 12), (1, 12), 3, 3), Groups((12, 12), (12, 1), 2, 4)
    drop_scores, grow_scores = torch.rand(36, generator=rng), torch.rand(candidates.numel(), generator=rng)
    parts = [Partition.of(g, topology.indices, candidates) for g in (rows, columns)]
    dropped, grown = exchange(drop_scores, grow_scores, 10, parts)
    assert dropped.numel() >= 8
    after = swapped(topology, dropped, candidates[grown])
    assert set(rows.counts(after).tolist()) == {3}
    assert set(columns.counts(after).tolist()) <= {2, 3, 4}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data())
def test_layers_one_after_another_are_groups_like_others(sizes: list[int], data: st.DataObject) -> None:
    others = [data.draw(st.integers(0, 6)) for _ in sizes]
    slack = torch.tensor([data.draw(st.integers(0, size)) for size in sizes])
    room = torch.tensor([data.draw(st.integers(0, 6)) for _ in sizes])
    drop_scores, grow_scores = scores(data.draw, sum(sizes)), scores(data.draw, sum(others))
    n = data.draw(st.integers(0, sum(sizes)))
    labels = [torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts)) for counts in (sizes, others)]
    short = exchange(drop_scores, grow_scores, n, [Partition(sizes, others, slack, room)])
    long = exchange(drop_scores, grow_scores, n, [Partition(labels[0], labels[1], slack, room)])
    assert [at.tolist() for at in short] == [at.tolist() for at in long]
    reverse = exchange(grow_scores, drop_scores, n, [Partition(sizes, others, slack, room).swapped()])
    assert reverse[0].numel() == reverse[1].numel()


@given(GRID, st.data())
def test_groups_are_the_tiles_of_the_mask(grid: tuple[int, int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, grid[0] * grid[1]))
    topology = Topology.random(grid, count, generator(0, "test"))
    mask = topology.to_mask()
    rows = Groups.of_neurons(grid, "in", (0.5, 1.5), count)
    columns = Groups.of_neurons(grid, "out", (1.0, 1.0), count)
    assert rows.counts(topology.indices).tolist() == mask.sum(1).tolist()
    assert columns.counts(topology.indices).tolist() == mask.sum(0).tolist()
    assert columns.least == count // grid[1]
    assert columns.most == -(-count // grid[1])
    assert (rows.least, rows.most) == (
        int(0.5 * count / grid[0] + 1e-9),
        min(grid[1], -int(-1.5 * count / grid[0] // 1)),
    )


def test_heads_are_bands_and_blocks_may_not_cross_them() -> None:
    heads = Groups.of_heads((4, 3), (2, 4), HeadLayout("out", 4), 2)
    assert (heads.tile, heads.count, heads.size) == ((2, 3), 2, 6)
    assert heads.of(torch.tensor([0, 1, 2, 3, 4])).tolist() == [0, 0, 1, 1, 0]
    into = Groups.of_heads((4, 6), (1, 1), HeadLayout("in", 2), 1)
    assert (into.tile, into.of(torch.tensor([0, 8, 20])).tolist()) == ((4, 2), [0, 1, 2])
    with pytest.raises(ValueError, match="cross heads"):
        Groups.of_heads((4, 3), (3, 4), HeadLayout("out", 4), 2)


def test_what_another_partition_sees_to_is_left_out() -> None:
    grid = (8, 6)
    rows, heads = Groups(grid, (1, 6), 3, 3), Groups(grid, (4, 6), 10, 24)
    loose, free = Groups(grid, (8, 1), 1, 7), Groups(grid, grid, 0, 48)
    assert binding([heads, loose, free, rows, rows]) == [rows, loose]
    tighter = Groups(grid, (4, 6), 13, 24)
    assert binding([tighter, rows]) == [rows, tighter]
