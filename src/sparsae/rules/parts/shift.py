"""Density that moves between layers along with an exchange of connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsae.core.budgets import allocate
from sparsae.core.groups import binding
from sparsae.core.observation import LayerView
from sparsae.core.swap import Swap

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def shifted(views: Mapping[str, LayerView], swap: Swap, relative: Mapping[str, float], rng: torch.Generator) -> Swap:
    """A swap that keeps layers' counts, changed so that these move towards proportions; the model keeps its count.

    relative: the counts wanted, up to a common factor. A layer that gains drops fewer units, the weakest still; one
    that loses grows fewer, any of them. So none moves by more than it exchanges; bounds hold, and a layer with limits
    on heads or neurons, which this might leave, keeps its count.
    """
    limits = {}
    for name, view in views.items():
        count, (low, high) = view.topology.count, view.bounds
        n = 0 if binding(view.groups) or name not in swap.drop else swap.drop[name].numel()
        limits[name] = min(count, max(low, count - n)), max(count, min(high, count + n))
    counts = {name: view.topology.count for name, view in views.items()}
    goals = allocate([relative[name] for name in views], list(limits.values()), [1] * len(views), sum(counts.values()))
    drop, grow = dict(swap.drop), dict(swap.grow)
    for (name, view), goal in zip(views.items(), goals, strict=True):
        if (change := goal - counts[name]) > 0:
            drop[name] = _weakest(view, drop[name], drop[name].numel() - change)
        elif change < 0:
            grow[name] = _any(grow[name], grow[name].numel() + change, rng)
    return Swap(drop, grow, swap.shrinks)


def _weakest(view: LayerView, units: Tensor, n: int) -> Tensor:
    """n of a layer's active units, those of the smallest size."""
    import torch

    from sparsae.core.ranking import smallest

    positions = torch.searchsorted(view.topology.indices, units)
    return units[smallest(view.magnitude[positions], n)]


def _any(units: Tensor, n: int, rng: torch.Generator) -> Tensor:
    import torch

    from sparsae.core.host import on_device

    return units[on_device(torch.randperm(units.numel(), generator=rng, device="cpu")[:n], units.device)]
