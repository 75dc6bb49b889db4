"""Which units are dropped and which are grown, by their scores, inside the limits of layers, heads and neurons.

Where no limit can bind, the scores alone choose. Else `core.selection` does: what moves may be less than was asked for,
and no group ends outside its limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsae.core.groups import Groups, binding
from sparsae.core.host import on_device
from sparsae.core.observation import LayerView, Observation
from sparsae.core.ranking import best_of_each, places, select, smallest
from sparsae.core.selection import Partition, exchange, joined
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.rules.parts.grow import Growth

Units = tuple[Tensor, Tensor]  # units to drop, units to grow: they have none in common


def in_layer(view: LayerView, scores: Tensor, n: int, growth: Growth) -> Units:
    """Drops the n active units with the smallest scores, grows the n best candidates: the layer's count stays."""
    groups = binding(view.groups)
    if not groups:
        return without_limits(view, smallest(scores, n), n, growth)
    active, everything = view.topology.indices, torch.arange(view.topology.count, device=scores.device)
    units, grow_scores, needs = _candidates(view, everything, growth)
    partitions = [Partition.of(part, active, units) for part in groups]
    return _units(active, units, needs, *exchange(scores, grow_scores, n, partitions, needs))


def without_limits(view: LayerView, dropped: Tensor, n: int, growth: Growth) -> Units:
    """Drops the active units at the positions `dropped`, grows the n best candidates."""
    units, grow_scores, needs = _candidates(view, dropped, growth)
    return _units(view.topology.indices, units, needs, dropped, smallest(grow_scores, n))


def over_layers(
    views: Mapping[str, LayerView], scores: Mapping[str, Tensor], growths: Mapping[str, Growth], n: int
) -> dict[str, Units]:
    """Grows the n best candidates of all layers together, drops as many: as bounds and groups allow.

    What is grown is chosen first; candidates that are dropped at once are not asked for.
    """
    drop_scores = torch.cat([scores[name] for name in views])
    grow_scores = torch.cat([-growths[name].scores for name in views])
    partitions = _partitions(views, {name: growths[name].units for name in views})
    grown, dropped = exchange(grow_scores, drop_scores, n, [partition.swapped() for partition in partitions])
    return _by_layer(views, growths, dropped, grown)


def pruned(view: LayerView, scores: Tensor, n: int) -> Tensor:
    """Positions of n active units with the smallest scores, that leave the groups inside what they shall have then.

    Their limits are those for as many units as are left. n are always dropped: where neurons are bounded on both sides,
    or were outside before, the limits give way.
    """
    groups = binding([part.at(view.topology.count - n) for part in view.groups])
    if not groups:
        return smallest(scores, n)
    active = view.topology.indices
    order = places(scores, torch.zeros_like(active, dtype=torch.int64), 1)
    for part in groups[1:]:
        # First in the order is what a ceiling wants dropped, last what a floor wants kept.
        labels, counts = part.of(active), part.counts(active)
        must = best_of_each(order, labels, (counts - part.most).clamp_(min=0))
        may = best_of_each(order, labels, (counts - part.least).clamp_(min=0))
        order = order + order.numel() * (may.logical_not().long() - must.long())
    head, counts = groups[0], groups[0].counts(active)
    most = (counts - head.least).clamp_(min=0)
    least = torch.minimum(most, (counts - head.most).clamp_(min=0))
    ceiling = head.most
    while int(least.sum()) > n:
        ceiling += 1
        least = torch.minimum(most, (counts - ceiling).clamp_(min=0))
    return select(order, n, head.of(active), least, most)


def regenerated(view: LayerView, scores: Tensor, pruned_at: Tensor, n: int, growth: Growth) -> Units:
    """Prunes the units at the positions `pruned_at`; of what is left n more are dropped, for n candidates.

    Where candidates may be units that were dropped, those of `pruned_at` may be grown again.
    """
    groups = binding([part.at(view.topology.count - pruned_at.numel()) for part in view.groups])
    if not groups:
        # The n smallest of what is left are the next smallest.
        return without_limits(view, smallest(scores, pruned_at.numel() + n), n, growth)
    active = view.topology.indices
    stays = torch.ones(view.topology.count, dtype=torch.bool, device=active.device)
    stays.index_fill_(0, pruned_at, False)
    left = Topology(view.topology.shape, active[stays], view.topology.unit)
    if growth.returning is not None:
        growth = Growth(
            torch.cat([growth.units.to(active), active[pruned_at]]),
            torch.cat([growth.scores, growth.returning[pruned_at]]),
            growth.returning[stays],
        )
    view = dataclasses.replace(view, topology=left, groups=tuple(groups))
    drop, grow = in_layer(view, scores[stays], n, growth)
    back = torch.isin(grow, active[pruned_at], assume_unique=True)
    pruned_units = active[pruned_at]
    return torch.cat([pruned_units[~torch.isin(pruned_units, grow[back], assume_unique=True)], drop]), grow[~back]


def keeps_limits(views: Mapping[str, LayerView], swap: Swap) -> bool:
    """Whether every touched layer stays inside its bounds after a swap, and its groups inside theirs.

    Of a model that is pruned the groups are left out: their limits move, and may have to give way (see `pruned`).
    """
    for name, change in swap.count_changes().items():
        view, empty = views[name], views[name].topology.indices[:0]
        if not view.holds(view.topology.count + change):
            return False
        if view.ends is None and not view.keeps_groups(swap.drop.get(name, empty), swap.grow.get(name, empty)):
            return False
    return True


def within_limits(observation: Observation, swap: Swap, rng: torch.Generator) -> Swap:
    """A random swap where it keeps the limits; else as much of it as can, the rest being other random units.

    Layers whose number of units it leaves as it is keep theirs.
    """
    if keeps_limits(observation.layers, swap):
        return swap
    changes = swap.count_changes()
    views = {name: observation.layers[name] for name in changes}
    scores, growths = {}, {}
    for name, view in views.items():
        empty = view.topology.indices[:0]
        drop, grow = swap.drop.get(name, empty), swap.grow.get(name, empty)
        drawn = torch.rand(view.topology.count, generator=rng, dtype=torch.float64, device="cpu")
        scores[name] = on_device(drawn, drop.device)
        scores[name][view.topology.positions(drop)] -= 1
        order = torch.rand(grow.numel(), generator=rng, dtype=torch.float64, device="cpu")
        growths[name] = Growth(grow, on_device(order, grow.device))
    units: dict[str, Units] = {}
    if any(changes.values()):
        units = over_layers(views, scores, growths, swap.size)
    else:
        for name, view in views.items():
            units |= over_layers({name: view}, scores, growths, swap.drop[name].numel())
    return Swap({name: drop for name, (drop, _) in units.items()}, {name: grow for name, (_, grow) in units.items()})


def _candidates(view: LayerView, pool: Tensor, growth: Growth) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k,) units that may be grown, in order; their scores, the best smallest; and of which position each is the unit.

    pool: positions of active units that may be grown again once they are dropped.
    """
    if growth.returning is None:
        return growth.units, -growth.scores, None
    active = view.topology.indices
    units, order = torch.cat([growth.units.to(active), active[pool]]).sort()
    scores = torch.cat([growth.scores, growth.returning[pool].to(growth.scores)])
    needs = torch.cat([torch.full_like(growth.units, -1, dtype=torch.int64), pool])
    return units, -scores[order], needs[order]


def _units(active: Tensor, units: Tensor, needs: Tensor | None, dropped: Tensor, grown: Tensor) -> Units:
    """The units at these positions, without those that are both dropped and grown."""
    if needs is None:
        return active[dropped], units[grown]
    returning = needs[grown]
    # The last one is nobody's: what is new needs the unit at -1.
    leaves = torch.zeros(active.numel() + 1, dtype=torch.bool, device=active.device)
    # A number that is assigned to positions goes to the device first, and waits; one that fills does not.
    leaves.index_fill_(0, dropped, True).index_fill_(0, returning, False)
    return active[leaves[:-1]], units[grown[returning < 0]]


def _partitions(views: Mapping[str, LayerView], candidates: Mapping[str, Tensor]) -> list[Partition]:
    """Of units of several layers, one after another: groups, those with the least freedom first; the layers' bounds."""
    found = {name: binding(view.groups) for name, view in views.items()}
    parts = []
    for i in range(max(map(len, found.values()), default=0)):
        of_each = []
        for name, view in views.items():
            whole = Groups.of_layer(view.topology.grid, 0, view.topology.units)
            part = found[name][i] if i < len(found[name]) else whole
            of_each.append(Partition.of(part, view.topology.indices, candidates[name]))
        parts.append(joined(of_each))
    counts = {name: view.topology.count for name, view in views.items()}
    above = [max(0, counts[name] - view.bounds[0]) for name, view in views.items()]
    below = [max(0, view.bounds[1] - counts[name]) for name, view in views.items()]
    slack, room = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (above, below))
    sizes = [candidates[name].numel() for name in views]
    return [*parts, Partition(list(counts.values()), sizes, slack, room)]


def _by_layer(
    views: Mapping[str, LayerView], growths: Mapping[str, Growth], dropped: Tensor, grown: Tensor
) -> dict[str, Units]:
    """Positions in the lists of all layers, one after another, as units of each."""
    active = [view.topology.indices for view in views.values()]
    units = [growths[name].units for name in views]
    drops, grows = _split(dropped, active), _split(grown, units)
    return {
        name: (a[on_device(drop, a.device)], u[on_device(grow, u.device)])
        for name, a, u, drop, grow in zip(views, active, units, drops, grows, strict=True)
    }


def _split(positions: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    ends = torch.tensor([part.numel() for part in parts], dtype=torch.int64, device=positions.device).cumsum(0)
    cuts = torch.searchsorted(positions, ends).tolist()
    starts = [0, *ends.tolist()[:-1]]
    return [positions[a:b] - start for a, b, start in zip([0, *cuts[:-1]], cuts, starts, strict=True)]
