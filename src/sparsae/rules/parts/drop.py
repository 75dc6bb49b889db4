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
) -> dict[str, Tensor]:
    """Positions of the n smallest scores of all layers together, at least `least` and at most `most` in each layer.

    Raises ValueError where that does not leave n.
    """
    import torch

    from sparsae.core.ranking import smallest

    if not sum(least.values()) <= n <= sum(most.values()):
        raise ValueError(f"{n} scores are not between {sum(least.values())} and {sum(most.values())}")
    chosen, between = {}, {}
    for name, layer in scores.items():
        chosen[name] = torch.zeros(layer.numel(), dtype=torch.bool, device=layer.device)
        chosen[name][smallest(layer, least[name])] = True
        allowed = smallest(layer, most[name])
        between[name] = allowed[~chosen[name][allowed]]
    # Those that must go and those that may not take no part, so no score can be taken for theirs.
    open_scores = torch.cat([layer[between[name]] for name, layer in scores.items()])
    goes = torch.zeros(open_scores.numel(), dtype=torch.bool, device=open_scores.device)
    goes[smallest(open_scores, n - sum(least.values()))] = True
    for part, (name, positions) in zip(goes.split([p.numel() for p in between.values()]), between.items(), strict=True):
        chosen[name][positions[part]] = True
    return {name: layer.nonzero().squeeze(1) for name, layer in chosen.items()}
