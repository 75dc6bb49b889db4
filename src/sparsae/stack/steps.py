"""The optimizer steps of several runs as one update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparsae.core.host import on_device
from sparsae.optim import step_together
from sparsae.train.passes import Step


@torch.no_grad()
def norms_of(wanted: Sequence[Step]) -> dict[Step, float]:
    """The norm of each one's gradients, which are scaled by then as `clip_gradients` does, and the steps made."""
    by_device: dict[torch.device, list[Step]] = {}
    for each in wanted:
        by_device.setdefault(each.parameters[0].device, []).append(each)
    found: dict[Step, float] = {}
    for steps in by_device.values():
        found |= dict(zip(steps, _clipped(steps), strict=True))
    step_together(each.optimizer for each, norm in found.items() if each.is_made(norm))
    return found


def _clipped(steps: Sequence[Step]) -> list[float]:
    """Norms of gradients on one device, which is waited for once."""
    grads = [[p.grad for p in each.parameters if p.grad is not None] for each in steps]
    every = [grad for own in grads for grad in own]
    if not every:
        return [0.0] * len(steps)
    norms = torch.stack(torch._foreach_norm(every)).split([len(own) for own in grads])
    totals = torch.linalg.vector_norm(pad_sequence(list(norms), batch_first=True), dim=1)
    clips = [math.inf if each.clip is None else each.clip for each in steps]
    most = torch.tensor(clips, dtype=totals.dtype, device="cpu")
    factors = (on_device(most, totals.device) / (totals + 1e-6)).clamp(max=1.0)
    found, scales = torch.stack((totals, factors)).tolist()
    scaled: list[Tensor] = []
    by: list[float] = []
    for each, own, scale in zip(steps, grads, scales, strict=True):
        if scale != 1.0 and each.clip is not None:
            scaled += own
            by += [scale] * len(own)
    if scaled:
        torch._foreach_mul_(scaled, by)
    return [float(norm) for norm in found]
