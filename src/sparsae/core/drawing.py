"""Random topologies and units within groups, in O(n log n) time and O(n) memory for n active or wanted units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sparsae.core.groups import Groups
from sparsae.core.ranking import search
from sparsae.core.topology import Topology, index_dtype, sample_distinct


def random_topology(
    shape: tuple[int, int], unit: tuple[int, int], count: int, groups: Sequence[Groups], rng: torch.Generator
) -> Topology:
    """`count` random units within groups, which have to be able to hold so many.

    Heads with a floor get it first, and the rest falls anywhere; a quota leaves none. Of neurons that got
    too many or too few units, random ones move then (see `evened`). Without groups the draw is uniform.
    """
    heads = [part for part in groups if part.fan is None and part.least]
    topology = _above_floors(shape, unit, count, heads[0], rng) if heads else Topology.random(shape, count, rng, unit)
    for neurons in with_heads_floors(groups):
        assert neurons.fan is not None
        topology = evened(topology, neurons.fan, neurons.least, neurons.most, rng)
    return topology


def with_heads_floors(groups: Sequence[Groups]) -> list[Groups]:
    """The groups of neurons, each with its share of the floor of a head that consists of them."""
    heads = [part for part in groups if part.fan is None]
    found = []
    for neurons in groups:
        if neurons.fan is not None:
            floors = [math.ceil(part.least * neurons.size / part.size) for part in heads if part.consists_of(neurons)]
            found.append(replace(neurons, least=max([neurons.least, *floors])))
    return found


def _above_floors(
    shape: tuple[int, int], unit: tuple[int, int], count: int, heads: Groups, rng: torch.Generator
) -> Topology:
    if heads.is_quota:  # there may be millions
        places = _sample_alike(heads.size, heads.least, heads.count, rng)
    else:
        drawn = (sample_distinct(heads.size, heads.least, rng) + head * heads.size for head in range(heads.count))
        places = torch.cat(list(drawn))
    units = heads.units(places).sort().values
    floors = Topology(shape, units.to(index_dtype(heads.grid[0] * heads.grid[1])), unit)
    return floors.replace(floors.indices[:0], floors.sample_inactive(count - floors.count, rng))[0]


def sample_in_groups(groups: Groups, taken: Tensor, counts: Tensor, rng: torch.Generator) -> Tensor:
    """counts[g] units of each group g, none of the distinct units `taken`, uniformly: sorted, (n,) int64 on the CPU.

    Of a group that has fewer left, all are drawn.
    """
    taken = groups.place(taken.cpu()).sort().values
    free = groups.size - _count_of_each(taken // groups.size, groups.count)
    ranks = sample_from_each(free, torch.minimum(counts.cpu(), free), rng)
    # As `Topology.inactive_at`: the r-th free place is r plus the taken ones before it.
    gaps = taken - torch.arange(taken.numel(), device="cpu")
    return groups.units(ranks + search(gaps, ranks, right=True)).sort().values


def sample_from_each(sizes: Tensor, counts: Tensor, rng: torch.Generator) -> Tensor:
    """counts[g] distinct numbers from each of G ranges of sizes[g] numbers that follow one another from 0: sorted.

    Draws are repeated until each range has enough; of a range of which more than half is wanted, what stays out is
    drawn. So at least every other draw is new.
    """
    ends = sizes.cumsum(0)
    starts = ends - sizes
    inverted = 2 * counts > sizes
    wanted = torch.where(inverted, sizes - counts, counts)
    drawn, missing = torch.empty(0, dtype=torch.int64, device="cpu"), wanted
    while bool(missing.any()):
        group = torch.arange(sizes.numel(), device="cpu").repeat_interleave(missing)
        share = torch.rand(group.numel(), generator=rng, dtype=torch.float64, device="cpu")
        number = torch.minimum((share * sizes[group]).long(), sizes[group] - 1)  # the product may be rounded up
        drawn = torch.cat([drawn, starts[group] + number]).unique()
        of_each = torch.searchsorted(ends, drawn, right=True)
        missing = wanted - _count_of_each(of_each, sizes.numel())
    if not bool(inverted.any()):
        return drawn
    all_of = torch.arange(sizes.numel(), device="cpu").repeat_interleave(torch.where(inverted, sizes, 0))
    first = torch.where(inverted, sizes, 0).cumsum(0) - torch.where(inverted, sizes, 0)
    numbers = starts[all_of] + torch.arange(all_of.numel(), device="cpu") - first[all_of]
    rest = drawn[~inverted[torch.searchsorted(ends, drawn, right=True)]]
    return torch.cat([rest, numbers[~_among(drawn, numbers)]]).sort().values


def _sample_alike(size: int, n: int, count: int, rng: torch.Generator) -> Tensor:
    """n distinct numbers from each of `count` ranges of `size` numbers that follow one another, each set as likely.

    Selection sampling (Knuth): the next number is taken with the chance that as many as are wanted still have among
    those that are left. O(count) memory.
    """
    wanted, found = torch.full((count,), n, dtype=torch.int64, device="cpu"), []
    for i in range(size):
        taken = torch.randint(size - i, (count,), generator=rng, device="cpu") < wanted
        found.append(taken.nonzero().squeeze(1) * size + i)
        wanted -= taken.long()
    return torch.cat(found)


def evened(topology: Topology, fan: Literal["in", "out"], least: int, most: int, rng: torch.Generator) -> Topology:
    """With at least `least` and at most `most` active units in each row (fan "in") or column (fan "out") of the grid.

    Random units of rows that have too many move to random rows that have too few, inside their columns, so that no
    column's count changes; and likewise for columns. As few move as can. The mean must be inside the limits.
    """
    across, along = topology.grid if fan == "in" else topology.grid[::-1]
    if 2 * topology.count > topology.units:
        rest = topology.inactive_at(torch.arange(topology.units - topology.count, device="cpu"))
        inverse = Topology(topology.shape, rest, topology.unit)
        inverse = evened(inverse, fan, along - most, along - least, rng)
        units = inverse.inactive_at(torch.arange(topology.count, device="cpu"))
        return Topology(topology.shape, units.to(topology.indices.dtype), topology.unit)
    row, column = topology.rows.long(), topology.columns.long()
    codes = (row * along + column if fan == "in" else column * along + row).sort().values
    codes = _moved_between_lines(codes, across, along, (least, most), rng)
    line, place = codes // along, codes % along
    units = place * topology.grid[0] + line if fan == "in" else codes
    return Topology(topology.shape, units.sort().values.to(topology.indices.dtype), topology.unit)


def _moved_between_lines(
    codes: Tensor, lines: int, along: int, limits: tuple[int, int], rng: torch.Generator
) -> Tensor:
    """Sorted codes, line * along + place, with units moved to other lines at the same place, as `evened` says."""
    counts = _count_of_each(codes // along, lines)
    target = _levelled(counts, *limits, rng)
    pending = sample_from_each(counts, (counts - target).clamp_(min=0), rng)  # ranks among the codes
    into = torch.arange(lines, device="cpu").repeat_interleave((target - counts).clamp_(min=0))
    taken, added = torch.zeros_like(codes, dtype=torch.bool), codes[:0]
    while pending.numel():
        into = into[torch.randperm(into.numel(), generator=rng, device="cpu")]
        moved = into * along + codes[pending] % along
        free = ~_among(codes, moved) & ~_among(added, moved) & _first_of_equals(moved)
        if not bool(free.any()):
            # A line that has too many units has one whose place is free in a line that has too few: it is moved there.
            first = codes[pending[0]] // along
            able = ((codes >= first * along) & (codes < (first + 1) * along) & ~taken).nonzero().squeeze(1)
            there = into[0] * along + codes[able] % along
            able = able[~_among(codes, there) & ~_among(added, there)]
            other = able[torch.randint(able.numel(), (1,), generator=rng, device="cpu")]
            pending[pending == other] = pending[0]
            pending[0] = other
            moved[0], free[0] = into[0] * along + codes[other] % along, True
        taken[pending[free]] = True
        added = torch.cat([added, moved[free]]).sort().values
        pending, into = pending[~free], into[~free]
    return torch.cat([codes[~taken], added])


def _levelled(counts: Tensor, least: int, most: int, rng: torch.Generator) -> Tensor:
    """The counts inside [least, most] with the same sum that differ least: cut off above a level, or filled to one."""
    total, inside = int(counts.sum()), counts.clamp(least, most)
    if not least * counts.numel() <= total <= most * counts.numel():
        raise ValueError(f"{total} units are not between {least} and {most} for each of {counts.numel()}")
    low, high = least, most
    if int(inside.sum()) > total:
        while high - low > 1:
            level = (low + high) // 2
            low, high = (level, high) if int(inside.clamp(max=level).sum()) <= total else (low, level)
        target, movable, step = inside.clamp(max=low), inside > low, 1
    else:
        while high - low > 1:
            level = (low + high) // 2
            low, high = (low, level) if int(inside.clamp(min=level).sum()) >= total else (level, high)
        target, movable, step = inside.clamp(min=high), inside < high, -1
    open_ = movable.nonzero().squeeze(1)
    open_ = open_[torch.randperm(open_.numel(), generator=rng, device="cpu")]
    target[open_[: abs(total - int(target.sum()))]] += step
    return target


def _count_of_each(groups: Tensor, count: int) -> Tensor:
    return torch.bincount(groups, minlength=count)


def _among(sorted_numbers: Tensor, numbers: Tensor) -> Tensor:
    """(n,) bool: which of the numbers are among the sorted ones."""
    if not sorted_numbers.numel():
        return torch.zeros_like(numbers, dtype=torch.bool)
    at = search(sorted_numbers, numbers).clamp_(max=sorted_numbers.numel() - 1)
    return sorted_numbers[at] == numbers


def _first_of_equals(numbers: Tensor) -> Tensor:
    """(n,) bool: the first of each of the numbers."""
    ordered, order = numbers.sort(stable=True)
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[order[1:]] = ordered[1:] != ordered[:-1]
    return first
