"""Which units are dropped and which are grown, so that every group stays inside its limits.

Two lists are ranked: what may be dropped, and what may be grown. n of each are taken, the best that the groups allow; n
is lowered where they allow fewer, down to nothing, so that no choice is ever outside the limits.

One partition is obeyed exactly: each group drops at most as many as it has above its floor and could grow again, and
then grows at least as many as it lacks and at most as many as it has room for. Of several partitions that cross (rows
and columns) the first is obeyed so. Towards the others there is caution: nothing is dropped that one of their floors
needs, whatever may be grown, and nothing is grown beyond the room that they have once the chosen ones are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsae.core.groups import Groups
from sparsae.core.ranking import Labels, best_of_each, first, places, positions, select, without

_ROUNDS = 8  # after which there is caution towards the first partition too


@dataclass(frozen=True, eq=False)
class Partition:
    """A partition as a choice needs it.

    active, candidates: the groups of the units that may be dropped and of those that may be grown, as ranking.py has
    them. slack: (G,) int64, by how much the count of each group may fall; room: by how much it may rise.
    """

    active: Labels
    candidates: Labels
    slack: Tensor
    room: Tensor

    @classmethod
    def of(cls, groups: Groups, active: Tensor, candidates: Tensor) -> Partition:
        """Of a layer, whose active units may be dropped, and where the candidates may be grown."""
        counts = groups.counts(active)
        slack, room = (counts - groups.least).clamp_(min=0), (groups.most - counts).clamp_(min=0)
        return cls(groups.of(active), groups.of(candidates), slack, room)

    def dropped(self, chosen: Tensor) -> Tensor:
        """(G,) int64: how many each group has of the chosen ones, an (m,) mask, of what may be dropped."""
        return _counts(self.active, chosen, self.slack)

    def grown(self, chosen: Tensor) -> Tensor:
        """(G,) int64: how many each group has of the chosen ones, a (k,) mask, of what may be grown."""
        return _counts(self.candidates, chosen, self.slack)

    def swapped(self) -> Partition:
        """The same for a choice that begins with what is grown: each list in the place of the other."""
        return Partition(self.candidates, self.active, self.room, self.slack)


def joined(parts: Sequence[Partition]) -> Partition:
    """One partition of the lists of several layers, one after another; each with groups as tensors."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.slack.numel())
    active, candidates = (
        torch.cat([labels + start for labels, start in zip(side, starts, strict=False) if isinstance(labels, Tensor)])
        for side in ([part.active for part in parts], [part.candidates for part in parts])
    )
    slack, room = torch.cat([part.slack for part in parts]), torch.cat([part.room for part in parts])
    return Partition(active, candidates, slack, room)


def exchange(
    drop_scores: Tensor,
    grow_scores: Tensor,
    n: int,
    partitions: Sequence[Partition],
    needs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions of what is dropped and of what is grown, equally many, at most n: the smallest scores that fit.

    drop_scores: (m,). grow_scores: (k,). needs: (k,) int64, the position among the (m,) of the unit that has to be
    dropped for this one to be grown (the unit itself, which then stays after all), or -1. Positions are ascending; of
    equal scores the first is taken, and NaN comes last.
    At least one partition is given.
    """
    lists = _Lists(drop_scores, grow_scores, needs, tuple(partitions))
    limits = lists.limits()
    for _ in range(_ROUNDS):
        may_drop = lists.may_drop(limits)
        n = _largest(min(n, int(may_drop.count_nonzero())), partial(lists.has_room, may_drop))
        dropped = lists.worst(may_drop, n)
        least, most = lists.wanted(dropped)
        may_grow = lists.may_grow(dropped, n, least, most)
        found = lists.head.grown(may_grow)
        n = min(n, int(torch.minimum(found, most).sum()))
        short = found < least
        if n == int(dropped.count_nonzero()) and not bool(short.any()):
            grown = select(without(grow_scores, ~may_grow), n, lists.head.candidates, least, torch.minimum(found, most))
            return positions(dropped, n), grown
        # What a group cannot grow again it must not drop.
        limits[0] = torch.where(short, torch.minimum(limits[0], lists.head.slack + found), limits[0])
    return lists.cautious(n)


@dataclass(frozen=True, eq=False)
class _Lists:
    """Both lists with their scores, and the partitions, the first of which is obeyed exactly."""

    drop_scores: Tensor
    grow_scores: Tensor
    needs: Tensor | None
    partitions: tuple[Partition, ...]

    @property
    def head(self) -> Partition:
        return self.partitions[0]

    def open(self, dropped: Tensor) -> Tensor:
        """(k,) bool: what may be grown at all once `dropped`, an (m,) mask, is dropped."""
        if self.needs is None:
            return torch.ones_like(self.grow_scores, dtype=torch.bool)
        return torch.cat([dropped, dropped.new_ones(1)])[self.needs]

    def limits(self) -> list[Tensor]:
        """How many of each group may be dropped: (G,) for each partition."""
        everything = torch.ones_like(self.drop_scores, dtype=torch.bool)
        back = self.head.grown(self.open(everything))
        return [self.head.slack + back, *(other.slack for other in self.partitions[1:])]

    def may_drop(self, limits: Sequence[Tensor]) -> Tensor:
        """(m,) bool: what scores well enough to be dropped within the limits, all of which any part of it keeps."""
        allowed = torch.ones_like(self.drop_scores, dtype=torch.bool)
        for partition, limit in zip(self.partitions, limits, strict=True):
            allowed &= best_of_each(without(self.drop_scores, ~allowed), partition.active, limit)
        return allowed

    def worst(self, may_drop: Tensor, n: int) -> Tensor:
        """(m,) bool: the n best of what may be dropped."""
        return first(without(self.drop_scores, ~may_drop), n)

    def wanted(self, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """How many each group of the first partition must and may grow once `dropped` is dropped."""
        lost = self.head.dropped(dropped)
        most = torch.minimum(self.head.room + lost, self.head.grown(self.open(dropped)))
        return (lost - self.head.slack).clamp_(min=0), most

    def has_room(self, may_drop: Tensor, n: int) -> bool:
        """Whether the first partition has room for n once the n best of what may be dropped are dropped."""
        return int(self.wanted(self.worst(may_drop, n))[1].sum()) >= n

    def may_grow(self, dropped: Tensor, n: int, least: Tensor, most: Tensor) -> Tensor:
        """(k,) bool: what may be grown, any part of which keeps within the room that the other partitions have.

        What the first partition alone would take has first claim to that room.
        """
        allowed, others = self.open(dropped), self.partitions[1:]
        if others:
            taken = select(without(self.grow_scores, ~allowed), n, self.head.candidates, least, most)
            order = places(self.grow_scores, torch.zeros_like(self.grow_scores, dtype=torch.int64), 1)
            order[taken] -= order.numel()
            allowed = _within_room(others, order, allowed, dropped)
        return allowed

    def cautious(self, n: int) -> tuple[Tensor, Tensor]:
        """As `exchange`, with caution towards all partitions."""
        may_drop = self.may_drop([partition.slack for partition in self.partitions])

        def may_grow(n: int) -> Tensor:
            dropped = self.worst(may_drop, n)
            return _within_room(self.partitions, self.grow_scores, self.open(dropped), dropped)

        n = min(n, int(may_drop.count_nonzero()))
        n = _largest(n, lambda n: int(may_grow(n).count_nonzero()) >= n)
        return positions(self.worst(may_drop, n), n), positions(first(without(self.grow_scores, ~may_grow(n)), n), n)


def _within_room(partitions: Sequence[Partition], order: Tensor, allowed: Tensor, dropped: Tensor) -> Tensor:
    """(k,) bool: the best of the allowed ones, as many as the partitions have room for after `dropped`."""
    for partition in partitions:
        room = partition.room + partition.dropped(dropped)
        allowed = allowed & best_of_each(without(order, ~allowed), partition.candidates, room)
    return allowed


def _counts(labels: Labels, chosen: Tensor, like: Tensor) -> Tensor:
    if isinstance(labels, Tensor):
        return torch.zeros_like(like).index_add_(0, labels, chosen.long())
    return torch.stack([part.count_nonzero() for part in chosen.split(list(labels))]).to(like.device)


def _largest(n: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to n that fits, where all up to some number do (0 always does)."""
    if fits(n):
        return n
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
