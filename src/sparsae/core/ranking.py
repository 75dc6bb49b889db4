"""The n smallest or largest of many scores, by a rule for ties that every run and every machine shares.

Of equal scores (-0.0 and 0.0 are equal) the first is taken, which `torch.topk` leaves open, and NaN comes last, whether
the smallest or the largest are wanted. How many there will be is known, and nothing here waits for a device to tell,
but for the limits of groups that lie one after another, where these are a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The group of each score, of [0, G), and then limits are (G,) tensors; or the sizes of groups that lie one after
# another, and then limits are as many ints.
Labels = Tensor | Sequence[int]
Limits = Tensor | Sequence[int]


def largest(scores: Tensor, n: int) -> Tensor:
    """Positions of the n largest of (m,) scores, ascending. Raises ValueError for n > m."""
    return smallest(-scores, n)


def smallest(scores: Tensor, n: int) -> Tensor:
    """Positions of the n smallest of (m,) scores, ascending. Raises ValueError for n > m."""
    return positions(first(scores, n), n)


def select(scores: Tensor, n: int, groups: Labels, least: Limits, most: Limits) -> Tensor:
    """Positions of the n smallest of (m,) scores with at least `least` and at most `most` of each group, ascending.

    No other choice within these limits has a smaller sum. The sum of `least` is at most n, and that of `most` (of the
    group's size, where that is less) at least; no `least` is more than its group's size or `most`. Nothing checks this,
    because that would wait for the device: n positions come in any case.
    """
    keys = order_keys(scores)
    if isinstance(groups, Tensor) and isinstance(least, Tensor) and isinstance(most, Tensor):
        place = places(keys, groups, least.numel())
        must, may = place < least[groups], place < most[groups]
    else:
        must, may = best_of_each(keys, groups, least), best_of_each(keys, groups, most)
    # What must be taken comes before every score, what may not be after every one, NaN included.
    return smallest(without(keys.masked_fill(must, torch.iinfo(keys.dtype).min), ~may), n)


def first(scores: Tensor, n: int) -> Tensor:
    """(m,) bool: whether a score is among the n smallest. Raises ValueError for n > m."""
    if not 0 <= n <= scores.numel():
        raise ValueError(f"cannot take {n} of {scores.numel()} scores")
    if n in (0, scores.numel()):
        return torch.full(scores.shape, n > 0, dtype=torch.bool, device=scores.device)
    # Selection and masks: O(m), where sorting would cost several times as much.
    threshold = kth_smallest(scores, n)
    below, equal = scores < threshold, scores == threshold
    if scores.is_floating_point():
        unknown, too_few = scores.isnan(), threshold.isnan()
        below |= too_few & ~unknown
        equal |= too_few & unknown
    equal &= equal.cumsum(0, dtype=torch.int32) <= n - below.count_nonzero()
    return below.logical_or_(equal)


def best_of_each(scores: Tensor, groups: Labels, limits: Limits) -> Tensor:
    """(m,) bool: whether a score is among the `limits` smallest of its group, all of them where these are more."""
    if isinstance(groups, Tensor):
        assert isinstance(limits, Tensor)
        return places(scores, groups, limits.numel()) < limits[groups]
    numbers = limits.tolist() if isinstance(limits, Tensor) else limits
    parts = zip(scores.split(list(groups)), numbers, strict=True)
    return torch.cat([first(part, min(limit, part.numel())) for part, limit in parts])


def places(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """(m,) int64: the place of each score among those of its group, of `count` groups, from 0 for the smallest."""
    keys = order_keys(scores)
    if keys.dtype == torch.int32:
        order = ((groups << 32) + keys).sort(stable=True).indices
    else:
        order = keys.sort(stable=True).indices
        order = order[groups[order].sort(stable=True).indices]
    sizes = torch.zeros(count, dtype=torch.int64, device=groups.device).index_add_(0, groups, torch.ones_like(groups))
    starts = sizes.cumsum(0) - sizes
    at = torch.arange(groups.numel(), device=groups.device) - starts[groups[order]]
    return torch.empty_like(groups).scatter_(0, order, at)


def without(scores: Tensor, excluded: Tensor) -> Tensor:
    """Scores in whose order those of the (m,) bool mask `excluded` come after all others, NaN included."""
    keys = order_keys(scores)
    return keys.masked_fill(excluded, torch.iinfo(keys.dtype).max)


def order_keys(scores: Tensor) -> Tensor:
    """Whole numbers in the order of the scores, equal where these are; NaN above all, with one to spare at either end.

    Whole numbers stay what they are.
    """
    if not scores.is_floating_point():
        return scores
    # The bits of a float, read as a whole number, order as floats do; among negative ones the other way round.
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    keys = (wide + 0.0).view(torch.int64 if wide.dtype == torch.float64 else torch.int32)  # -0.0 + 0.0 is 0.0
    limits = torch.iinfo(keys.dtype)
    keys ^= (keys >> (limits.bits - 1)).bitwise_and_(limits.max)
    return keys.masked_fill_(scores.isnan(), limits.max - 1)


# On the CPU numpy takes a half to a fifteenth of torch's time for the three that follow.


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """() the k-th smallest of (m,) scores, counted from 1; NaN comes last."""
    if scores.device.type != "cpu" or scores.dtype == torch.bfloat16:  # which numpy does not have
        return scores.kthvalue(k).values
    return torch.from_numpy(np.partition(scores.detach().numpy(), k - 1)[k - 1 : k]).squeeze(0)


def search(ascending: Tensor, numbers: Tensor, right: bool = False) -> Tensor:
    """(n,) int64: before which of (m,) ascending numbers each would have to stand; fastest for sorted ones.

    right: after all that are equal.
    """
    if ascending.device.type != "cpu" or ascending.dtype != numbers.dtype:
        return torch.searchsorted(ascending, numbers, right=right)
    return torch.from_numpy(np.searchsorted(ascending.numpy(), numbers.numpy(), side="right" if right else "left"))


def positions(chosen: Tensor, n: int) -> Tensor:
    """Where (m,) `chosen` is true, which is n times."""
    if chosen.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return torch.nonzero_static(chosen, size=n).squeeze(1)
