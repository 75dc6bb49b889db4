"""What is dropped: a score for each active unit; those with the lowest scores are dropped first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsae.core.observation import LayerView
from sparsae.errors import InputError

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


def scored(drop: Drop, view: LayerView, rng: torch.Generator) -> Tensor:
    """The scores by which a layer's units are dropped. Raises InputError for what is no score for each of them."""
    import torch

    scores: object = drop.scores(view, rng)
    name, count = type(drop).__name__, view.topology.count
    if not isinstance(scores, torch.Tensor):
        raise InputError(f"{name}.scores() must return a tensor of {count} scores, not {type(scores).__name__}")
    if scores.shape != (count,):
        raise InputError(
            f"{name}.scores() must return a score for each of the layer's {count} active units, shape ({count},), not "
            f"{tuple(scores.shape)}"
        )
    # The project's own are numbers wherever values are, and to look at them would wait for a device at each layer.
    if not type(drop).__module__.startswith("sparsae.") and bool(scores.isnan().any()):
        raise InputError(f"{name}.scores() has returned scores that are not a number (NaN), which have no order")
    return scores
