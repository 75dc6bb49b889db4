"""The n smallest or largest of many scores, by a rule for ties that every run and every machine shares."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, n: int) -> Tensor:
    """Positions of the n largest of (m,) scores, ascending; of equal ones the first. NaN ranks below everything.

    `torch.topk` leaves open which of equal scores it takes. Raises ValueError for n > m.
    """
    if not 0 <= n <= scores.numel():
        raise ValueError(f"cannot take {n} of {scores.numel()} scores")
    if n in (0, scores.numel()):
        return torch.arange(n, device=scores.device)
    missing = scores.isnan()
    if bool(missing.any()):
        # By position: any number in its place would tie with a score that is that number.
        known, unknown = (~missing).nonzero().squeeze(1), missing.nonzero().squeeze(1)
        best = known[largest(scores[known], min(n, known.numel()))]
        return torch.cat([best, unknown[: n - best.numel()]]).sort().values
    # Selection and masks: O(m), where sorting would cost several times as much.
    threshold = scores.kthvalue(scores.numel() - n + 1).values
    chosen = scores > threshold
    equal = (scores == threshold).nonzero().squeeze(1)
    chosen[equal[: n - int(chosen.sum())]] = True
    return chosen.nonzero().squeeze(1)


def smallest(scores: Tensor, n: int) -> Tensor:
    """Positions of the n smallest of (m,) scores, ascending; of equal ones the first. NaN ranks above everything."""
    return largest(-scores, n)
