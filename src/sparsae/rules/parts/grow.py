"""What is grown: how many units a layer can grow, which ones, and what has to be captured of gradients to know them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsae.core.observation import LayerView, Need, unit_magnitude

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw

Sampling = Literal["uniform", "grabo", "graest"]


class Grow(ABC):
    """Which inactive units of a layer become active.

    needs, accumulate, sample and probed_units: as `Rule` has them.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be captured."""
        return frozenset()

    @property
    def accumulate(self) -> Literal["last", "sum"]:
        """Over which backward passes of a step a dense gradient is taken."""
        return "last"

    def sample(self, topologies: Mapping[str, Topology], rng: torch.Generator) -> Mapping[str, Tensor | Draw]:
        """The inactive units whose gradients are wanted, by layer."""
        return {}

    def probed_units(self, active: int, inactive: int) -> int:
        """Of how many inactive units of a layer the gradient is computed, at most."""
        return 0

    def room(self, view: LayerView) -> int:
        """How many units the layer can grow."""
        return view.topology.units - view.topology.count

    @abstractmethod
    def exchange(self, view: LayerView, positions: Tensor, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(units to drop, units to grow) where the active units at `positions` are to be dropped and n are to be grown.

        The two have no unit in common: a unit that is dropped and grown at once is in neither, and keeps what it has.
        """


@dataclass(frozen=True)
class RandomGrowth(Grow):
    """Inactive units, uniformly."""

    def exchange(self, view: LayerView, positions: Tensor, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return view.topology.indices[positions], view.topology.sample_inactive(n, rng)


@dataclass(frozen=True)
class LargestGradient(Grow):
    """The largest |dL/dW| of all positions that are inactive once units were dropped, those among them (RigL).

    over: the dense gradient of a step's "last" backward pass, or the "sum" of all, which keeps every layer's in memory.
    """

    over: Literal["last", "sum"] = "last"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"dense_gradient"})

    @property
    def accumulate(self) -> Literal["last", "sum"]:
        return self.over

    def probed_units(self, active: int, inactive: int) -> int:
        return inactive

    def room(self, view: LayerView) -> int:
        return view.topology.count

    def exchange(self, view: LayerView, positions: Tensor, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return exchange(view, positions, n)


@dataclass(frozen=True)
class LargestSampledGradient(Grow):
    """The largest |dL/dW| of a sample of inactive units, computed there and nowhere else (GSE).

    ratio: gamma, positions drawn in terms of a layer's nnz. sampling: how they are drawn (`sampling.py`).
    """

    ratio: float = 1.0
    sampling: Sampling = "uniform"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradient_at"})

    def sample(self, topologies: Mapping[str, Topology], rng: torch.Generator) -> Mapping[str, Tensor | Draw]:
        from sparsae.rules.parts.sampling import drawn, sample_inactive

        if self.sampling == "uniform":
            return sample_inactive(topologies, self.ratio, rng)
        return drawn(topologies, self.ratio, self.sampling, rng)

    def probed_units(self, active: int, inactive: int) -> int:
        return min(round(self.ratio * active), inactive)

    def room(self, view: LayerView) -> int:
        return sample_of(view).numel()

    def exchange(self, view: LayerView, positions: Tensor, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        from sparsae.core.ranking import largest

        assert view.sample_gradient is not None
        sample = sample_of(view)
        grown = sample[largest(unit_magnitude(view.sample_gradient), n).to(sample.device)]
        return view.topology.indices[positions], grown


def exchange(view: LayerView, positions: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest gradients are grown, of units that are inactive once the active ones at `positions` were dropped.

    A unit that is both never left: it keeps its value and its moments. So (units to drop, units to grow) have none in
    common. Needs a dense gradient with at least n inactive units, or all that there are.
    """
    import torch

    from sparsae.core.ranking import largest

    if not positions.numel():
        return view.topology.indices[:0], view.topology.indices[:0]
    assert view.sample is not None
    assert view.sample_gradient is not None
    assert view.active_gradient is not None
    leaving = view.topology.indices[positions]
    units = torch.cat([leaving, view.sample.to(leaving)])
    gradients = torch.cat([unit_magnitude(view.active_gradient)[positions], unit_magnitude(view.sample_gradient)])
    units, order = units.sort()
    chosen = order[largest(gradients[order], n)]
    returned = torch.zeros(leaving.numel(), dtype=torch.bool, device=leaving.device)
    returned[chosen[chosen < leaving.numel()]] = True
    return leaving[~returned], view.sample[chosen[chosen >= leaving.numel()] - leaving.numel()]


def largest_sampled(views: Mapping[str, LayerView], n: int, most: Mapping[str, int]) -> dict[str, Tensor]:
    """The n sampled units with the largest gradients of all layers together, at most `most` in each layer."""
    from sparsae.rules.parts.drop import smallest_overall

    scores = {}
    for name, view in views.items():
        assert view.sample_gradient is not None
        scores[name] = -unit_magnitude(view.sample_gradient)
    chosen = smallest_overall(scores, n, dict.fromkeys(views, 0), most)
    return {name: sample_of(view)[chosen[name].to(sample_of(view).device)] for name, view in views.items()}


def sample_of(view: LayerView) -> Tensor:
    """The sampled units of a layer, of a rule that takes a sample."""
    assert view.sample is not None
    return view.sample
