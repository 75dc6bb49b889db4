"""What a density schedule adds to an update: small weights that are dropped, or random units that are grown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsae.core.budgets import allocate
from sparsae.core.drawing import sample_in_groups
from sparsae.core.groups import binding
from sparsae.core.host import on_device
from sparsae.core.observation import LayerView
from sparsae.core.ranking import best_of_each, smallest, without
from sparsae.core.schedule import Ends, counts_at
from sparsae.core.swap import Swap
from sparsae.rules.parts.choose import pruned


def on_schedule(
    views: Mapping[str, LayerView], swap: Swap, ends: Ends, levels: tuple[float, float], rng: torch.Generator
) -> Swap:
    """The rule's swap and what takes the layers from one level of the schedule to the next, as one swap.

    Each layer changes by as many units as lie between its numbers at the two levels, so that whatever density a rule
    has moved between layers stays where it is. On the way down the smallest weights of what the rule keeps are dropped,
    never what it has just grown unless nothing else is left; on the way up inactive units are grown, uniformly. A layer
    that has no room for its part leaves it to the others. Groups are then inside their limits for the new number of
    units, as far as these allow.
    """
    drop, grow = dict(swap.drop), dict(swap.grow)
    for name, n in _changes(views, swap, ends, levels).items():
        if not n:
            continue
        view, empty = views[name], views[name].topology.indices[:0]
        dropped, grown = drop.get(name, empty).to(empty), grow.get(name, empty).to(empty)
        chosen, source = view.topology.replace(dropped, grown)
        after = dataclasses.replace(view, topology=chosen)
        if n < 0:
            sizes = view.magnitude[source.clamp(min=0)].masked_fill(source < 0, torch.inf)
            fewer = chosen.indices[pruned(after, sizes, -n)]
            drop[name] = torch.cat([dropped, fewer[~torch.isin(fewer, grown, assume_unique=True)]])
            grow[name] = grown[~torch.isin(grown, fewer, assume_unique=True)]
        else:
            new = _drawn(after, n, rng).to(empty)
            # What the rule has just dropped and is grown again was never away.
            drop[name] = dropped[~torch.isin(dropped, new, assume_unique=True)]
            grow[name] = torch.cat([grown, new[~torch.isin(new, dropped, assume_unique=True)]])
    sizes_of = [sum(units.numel() for units in side.values()) for side in (drop, grow)]
    return Swap(drop, grow, sizes_of[0] - sizes_of[1])


def _changes(views: Mapping[str, LayerView], swap: Swap, ends: Ends, levels: tuple[float, float]) -> dict[str, int]:
    """By how many units each layer changes; all by more, or all by less."""
    before, after = (counts_at(ends, level) for level in levels)
    moved = swap.count_changes()
    wanted = [abs(after[name] - before[name]) for name in views]
    sign = 1 if sum(after.values()) > sum(before.values()) else -1
    room = []
    for name, view in views.items():
        count = view.topology.count + moved.get(name, 0)
        floors = [part.least * part.count for part in view.groups if part.fan is None]
        room.append(view.topology.units - count if sign > 0 else max(0, count - max([view.bounds[0], 1, *floors])))
    total = min(sum(wanted), sum(room))
    if any(n > most for n, most in zip(wanted, room, strict=True)):
        sizes = [view.topology.units for view in views.values()]
        relative = [max(n, 1e-6) / size for n, size in zip(wanted, sizes, strict=True)]
        wanted = allocate(relative, [(0, most) for most in room], sizes, total)
    return {name: sign * n for name, n in zip(views, wanted, strict=True)}


def _drawn(view: LayerView, n: int, rng: torch.Generator) -> Tensor:
    """n inactive units of a layer, uniformly where no group of it has limits, else inside these as far as can be."""
    topology = view.topology
    groups = binding([part.at(topology.count + n) for part in view.groups])
    if not groups:
        return topology.sample_inactive(n, rng)
    counts = [part.counts(topology.indices) for part in groups]
    lacks = [(part.least - count).clamp_(min=0) for part, count in zip(groups, counts, strict=True)]
    rooms = [(part.most - count).clamp_(min=0) for part, count in zip(groups, counts, strict=True)]
    # Whatever a floor needs is among what is chosen from, and of groups with a ceiling what fits below it: O(nnz).
    pool = [topology.sample_inactive(min(n, topology.units - topology.count), rng)]
    for part, lack, room in zip(groups, lacks, rooms, strict=True):
        wanted = room.clamp(max=n) if part.most < part.size else lack
        pool.append(sample_in_groups(part, topology.indices, wanted, rng).to(pool[0]))
    units = torch.cat(pool).unique()
    order = on_device(torch.rand(units.numel(), generator=rng, dtype=torch.float64, device="cpu"), units.device)
    for part, lack in zip(groups, lacks, strict=True):
        order = order - best_of_each(order, part.of(units), lack).to(order.dtype)
    allowed = torch.ones_like(order, dtype=torch.bool)
    for part, room in zip(groups, rooms, strict=True):
        allowed &= best_of_each(without(order, ~allowed), part.of(units), room)
    return units[smallest(without(order, ~allowed), n)]
