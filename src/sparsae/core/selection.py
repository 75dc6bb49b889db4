"""Which units go and which come, so that every group stays inside its limits.

Two lists are ranked: what may go, and what may come. n of each are taken, the best that the groups allow; n is lowered
where they allow fewer, down to nothing, so that no choice is ever outside the limits.

One partition is obeyed exactly: from each group go at most as many as it has above its floor and could get back, and
then come at least as many as it lacks and at most as many as it has room for. Of several partitions that cross (rows
and columns) the first is obeyed so. Towards the others there is caution: nothing goes that one of their floors needs,
whatever may come, and nothing comes beyond the room that they have once the chosen ones went.
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

    goes, comes: the groups of the units of the two lists, as ranking.py has them. slack: (G,) int64, by how much the
    count of each group may fall; room: by how much it may rise.
    """

    goes: Labels
    comes: Labels
    slack: Tensor
    room: Tensor

    @classmethod
    def of(cls, groups: Groups, active: Tensor, comes: Tensor) -> Partition:
        """Of a layer, whose active units may go, and where the units `comes` may come."""
        counts = groups.counts(active)
        slack, room = (counts - groups.least).clamp_(min=0), (groups.most - counts).clamp_(min=0)
        return cls(groups.of(active), groups.of(comes), slack, room)

    def going(self, chosen: Tensor) -> Tensor:
        """(G,) int64: how many each group has of the chosen ones, an (m,) mask, of what may go."""
        return _counts(self.goes, chosen, self.slack)

    def coming(self, chosen: Tensor) -> Tensor:
        """(G,) int64: how many each group has of the chosen ones, a (k,) mask, of what may come."""
        return _counts(self.comes, chosen, self.slack)

    def swapped(self) -> Partition:
        """The same for a choice that begins with what comes."""
        return Partition(self.comes, self.goes, self.room, self.slack)


def joined(parts: Sequence[Partition]) -> Partition:
    """One partition of the lists of several layers, one after another; each with groups as tensors."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.slack.numel())
    goes, comes = (
        torch.cat([labels + start for labels, start in zip(side, starts, strict=False) if isinstance(labels, Tensor)])
        for side in ([part.goes for part in parts], [part.comes for part in parts])
    )
    return Partition(goes, comes, torch.cat([part.slack for part in parts]), torch.cat([part.room for part in parts]))


def exchange(
    goes: Tensor, comes: Tensor, n: int, partitions: Sequence[Partition], needs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of what goes and of what comes, equally many, at most n: the smallest (m,) and (k,) scores that fit.

    needs: (k,) int64, the position in `goes` of the unit that has to go for this one to come (the unit itself, which
    then stays after all), or -1. Positions are ascending; of equal scores the first is taken, and NaN comes last.
    At least one partition is given.
    """
    lists = _Lists(goes, comes, needs, tuple(partitions))
    limits = lists.limits()
    for _ in range(_ROUNDS):
        may_go = lists.may_go(limits)
        n = _largest(min(n, int(may_go.count_nonzero())), partial(lists.has_room, may_go))
        going = lists.going(may_go, n)
        least, most = lists.wanted(going)
        may_come = lists.may_come(going, n, least, most)
        found = lists.head.coming(may_come)
        n = min(n, int(torch.minimum(found, most).sum()))
        short = found < least
        if n == int(going.count_nonzero()) and not bool(short.any()):
            coming = select(without(comes, ~may_come), n, lists.head.comes, least, torch.minimum(found, most))
            return positions(going, n), coming
        # What a group cannot get back it must not lose.
        limits[0] = torch.where(short, torch.minimum(limits[0], lists.head.slack + found), limits[0])
    return lists.cautious(n)


@dataclass(frozen=True, eq=False)
class _Lists:
    """Both lists with their scores, and the partitions, the first of which is obeyed exactly."""

    goes: Tensor
    comes: Tensor
    needs: Tensor | None
    partitions: tuple[Partition, ...]

    @property
    def head(self) -> Partition:
        return self.partitions[0]

    def open(self, going: Tensor) -> Tensor:
        """(k,) bool: what may come at all once `going`, an (m,) mask, went."""
        if self.needs is None:
            return torch.ones_like(self.comes, dtype=torch.bool)
        return torch.cat([going, going.new_ones(1)])[self.needs]

    def limits(self) -> list[Tensor]:
        """How many may go of each group: (G,) for each partition."""
        everything = torch.ones_like(self.goes, dtype=torch.bool)
        back = self.head.coming(self.open(everything))
        return [self.head.slack + back, *(other.slack for other in self.partitions[1:])]

    def may_go(self, limits: Sequence[Tensor]) -> Tensor:
        """(m,) bool: what is good enough to go within the limits, all of which any part of it keeps."""
        allowed = torch.ones_like(self.goes, dtype=torch.bool)
        for partition, limit in zip(self.partitions, limits, strict=True):
            allowed &= best_of_each(without(self.goes, ~allowed), partition.goes, limit)
        return allowed

    def going(self, may_go: Tensor, n: int) -> Tensor:
        """(m,) bool: the n best of what may go."""
        return first(without(self.goes, ~may_go), n)

    def wanted(self, going: Tensor) -> tuple[Tensor, Tensor]:
        """How many must and may come in each group of the first partition once `going` went."""
        gone = self.head.going(going)
        most = torch.minimum(self.head.room + gone, self.head.coming(self.open(going)))
        return (gone - self.head.slack).clamp_(min=0), most

    def has_room(self, may_go: Tensor, n: int) -> bool:
        """Whether n could come by the first partition once the n best of what may go went."""
        return int(self.wanted(self.going(may_go, n))[1].sum()) >= n

    def may_come(self, going: Tensor, n: int, least: Tensor, most: Tensor) -> Tensor:
        """(k,) bool: what may come, any part of which keeps within the room that the other partitions have.

        What the first partition alone would take has first claim to that room.
        """
        allowed, others = self.open(going), self.partitions[1:]
        if others:
            taken = select(without(self.comes, ~allowed), n, self.head.comes, least, most)
            order = places(self.comes, torch.zeros_like(self.comes, dtype=torch.int64), 1)
            order[taken] -= order.numel()
            allowed = _within_room(others, order, allowed, going)
        return allowed

    def cautious(self, n: int) -> tuple[Tensor, Tensor]:
        """As `exchange`, with caution towards all partitions."""
        may_go = self.may_go([partition.slack for partition in self.partitions])

        def may_come(n: int) -> Tensor:
            going = self.going(may_go, n)
            return _within_room(self.partitions, self.comes, self.open(going), going)

        n = min(n, int(may_go.count_nonzero()))
        n = _largest(n, lambda n: int(may_come(n).count_nonzero()) >= n)
        return positions(self.going(may_go, n), n), positions(first(without(self.comes, ~may_come(n)), n), n)


def _within_room(partitions: Sequence[Partition], order: Tensor, allowed: Tensor, going: Tensor) -> Tensor:
    """(k,) bool: the best of the allowed ones, as many as the partitions have room for once `going` went."""
    for partition in partitions:
        room = partition.room + partition.going(going)
        allowed = allowed & best_of_each(without(order, ~allowed), partition.comes, room)
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
