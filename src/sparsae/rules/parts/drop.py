"""What is dropped: a score for each active unit; those with the lowest scores are dropped first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsae.core.observation import LayerView

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.observation import Need


class Drop(ABC):
    """Which active units of a layer matter least."""

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be captured."""
        return frozenset()

    @abstractmethod
    def scores(self, view: LayerView, rng: torch.Generator) -> Tensor:
        """(count,) scores of the layer's active units; of equal ones the first is dropped."""


@dataclass(frozen=True)
class SmallestMagnitude(Drop):
    """|w|, or the L2 norm of a block."""

    def scores(self, view: LayerView, rng: torch.Generator) -> Tensor:
        return view.magnitude


@dataclass(frozen=True)
class RandomDrop(Drop):
    """Uniformly random."""

    def scores(self, view: LayerView, rng: torch.Generator) -> Tensor:
        import torch

        from sparsae.core.host import on_device

        scores = torch.rand(view.topology.count, generator=rng, dtype=torch.float64, device="cpu")
        return on_device(scores, view.topology.indices.device)
