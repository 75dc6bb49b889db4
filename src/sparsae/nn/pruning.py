"""One-shot magnitude pruning of a model in place: its smallest weights become zero, a layer at a time.

A weight that does not exist counts as a zero. The smallest weights of a pruned model are the smallest that are left of
the one before, so that one model goes through all sparsities, the lowest first, and no copy of it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsae.core.ranking import first
from sparsae.nn.conversion import dense_places
from sparsae.nn.linear import SparseLinear

_LOW = 15  # bits of a magnitude that the first of two counts leaves out


@dataclass(frozen=True, eq=False)
class Prunable:
    """The weights of a layer that exist, a view or the values, and how many positions have none."""

    weights: Tensor
    missing: int = 0

    @property
    def positions(self) -> int:
        """All that the dense layer has."""
        return self.weights.numel() + self.missing

    def zeros(self) -> int:
        """How many positions are zero."""
        return self.positions - int(self.weights.count_nonzero())

    @torch.no_grad()
    def prune(self, zeros: int) -> None:
        """Let at least so many positions be zero, the smallest magnitudes."""
        smallest = first(self.weights.abs().reshape(-1), max(0, zeros - self.missing))
        self.weights.masked_fill_(smallest.view(self.weights.shape), 0.0)


def prunable(layers: Mapping[str, nn.Module]) -> list[Prunable]:
    """Sparse layers as they are, and the matrices of dense modules that could become some."""
    dense = {name: module for name, module in layers.items() if not isinstance(module, SparseLinear)}
    found = [Prunable(place.matrix) for place in dense_places(dense).values()]
    for layer in layers.values():
        if isinstance(layer, SparseLinear):
            found.append(Prunable(layer.values, layer.out_features * layer.in_features - layer.values.numel()))
    return found


def uniform_zeros(layers: Sequence[Prunable], sparsity: float) -> list[int]:
    """How many positions of each layer are pruned where every layer gets the same sparsity."""
    return [round(sparsity * layer.positions) for layer in layers]


def global_zeros(layers: Sequence[Prunable], sparsity: float) -> list[int]:
    """How many positions of each layer are pruned where all weights are ranked together.

    The magnitude up to which they are is found by counting, so that no more than a layer's magnitudes exist at a time;
    of equal ones those of the first layers come first.
    """
    wanted = round(sparsity * sum(layer.positions for layer in layers)) - sum(layer.missing for layer in layers)
    if wanted <= 0:
        return [layer.missing for layer in layers]
    counts = [torch.bincount(_bits(layer) >> _LOW, minlength=1 << (31 - _LOW)) for layer in layers]
    before, high = _reached(counts, wanted)
    inside = [bits[bits >> _LOW == high] & ((1 << _LOW) - 1) for bits in map(_bits, layers)]
    below, low = _reached([torch.bincount(bits, minlength=1 << _LOW) for bits in inside], wanted - before)
    left = wanted - before - below
    zeros = []
    for layer, count, bits in zip(layers, counts, inside, strict=True):
        equal = min(left, int((bits == low).sum()))
        left -= equal
        zeros.append(layer.missing + int(count[:high].sum()) + int((bits < low).sum()) + equal)
    return zeros


def _reached(counts: Sequence[Tensor], wanted: int) -> tuple[int, int]:
    """(how many lie before, the number) of the first one up to which there are as many as wanted."""
    through = torch.stack([count.cpu() for count in counts]).sum(0).cumsum(0)
    at = int(torch.searchsorted(through, wanted))
    return int(through[at - 1]) if at else 0, at


def _bits(layer: Prunable) -> Tensor:
    """Magnitudes as whole numbers in the same order."""
    return layer.weights.detach().abs().reshape(-1).float().view(torch.int32)
