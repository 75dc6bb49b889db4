"""What is dropped: a score for each active unit; those with the lowest scores are dropped first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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

        return torch.rand(view.topology.count, generator=rng, dtype=torch.float64, device="cpu").to(view.values.device)


def smallest_overall(
    scores: Mapping[str, Tensor], n: int, least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """How many of the n smallest scores of all layers together, at least `least` and at most `most` in each, are whose.

    Raises ValueError where that does not leave n.
    """
    import torch

    from sparsae.core.ranking import select

    if not sum(least.values()) <= n <= sum(most.values()):
        raise ValueError(f"{n} scores are not between {sum(least.values())} and {sum(most.values())}")
    sizes = [layer.numel() for layer in scores.values()]
    limits = [[each[name] for name in scores] for each in (least, most)]
    chosen = select(torch.cat(list(scores.values())), n, sizes, *limits)
    borders = torch.tensor(sizes, dtype=torch.int64, device=chosen.device).cumsum(0)
    ends = torch.searchsorted(chosen, borders).tolist()
    return {name: end - start for name, start, end in zip(scores, [0, *ends], ends, strict=False)}
