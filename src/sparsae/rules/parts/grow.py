"""What is grown: how many units a layer can grow, which ones, and what has to be captured of gradients to know them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsae.core.cadence import LAST_STEP, Window
from sparsae.core.observation import LayerView, Need, unit_magnitude

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw

Sampling = Literal["uniform", "grabo", "graest"]


@dataclass(frozen=True, eq=False)
class Growth:
    """Inactive units of a layer with (k,) scores; those with the highest scores are grown first.

    returning: (count,) scores of the active units, where those that are dropped are candidates too. A unit that is
    dropped and grown at once never left: it keeps its value and its moments.
    """

    units: Tensor
    scores: Tensor
    returning: Tensor | None = None


class Grow(ABC):
    """Which inactive units of a layer become active.

    needs, window, accumulate, sample and probed_units: as `Rule` has them.
    """

    window: Window = LAST_STEP

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
    def candidates(self, view: LayerView, leaving: Tensor, n: int, rng: torch.Generator) -> Growth:
        """What may be grown where n units shall be, at least so many.

        leaving: positions of the active units that are dropped, unless limits of groups make it others.
        """


@dataclass(frozen=True)
class RandomGrowth(Grow):
    """Inactive units, uniformly."""

    def candidates(self, view: LayerView, leaving: Tensor, n: int, rng: torch.Generator) -> Growth:
        from sparsae.rules.parts.sampling import with_replacements

        return with_replacements(view, view.topology.indices[leaving], view.topology.sample_inactive(n, rng), rng)


@dataclass(frozen=True)
class LargestGradient(Grow):
    """The largest |dL/dW| of all positions that are inactive once units were dropped, those among them (RigL).

    over: the dense gradient of a step's "last" backward pass, or the "sum" of all, which keeps every layer's in memory.
    window: the steps that it is averaged over; more than one keep every layer's in memory, and each step's besides.
    """

    over: Literal["last", "sum"] = "last"
    window: Window = LAST_STEP

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

    def candidates(self, view: LayerView, leaving: Tensor, n: int, rng: torch.Generator) -> Growth:
        return largest_gradients(view)


@dataclass(frozen=True)
class LargestSampledGradient(Grow):
    """The largest |dL/dW| of a sample of inactive units, computed there and nowhere else (GSE).

    ratio: gamma, positions drawn in terms of a layer's nnz. sampling: how they are drawn (`sampling.py`). window: the
    steps that gradients are averaged over, at positions drawn before the first. temperature: of Gumbel noise on
    2 log|dL/dW|, so that positions are drawn with odds |dL/dW|^(2 / temperature); 0: none.
    """

    ratio: float = 1.0
    sampling: Sampling = "uniform"
    window: Window = LAST_STEP
    temperature: float = 0.0

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

    def candidates(self, view: LayerView, leaving: Tensor, n: int, rng: torch.Generator) -> Growth:
        growth = largest_gradients(view)
        if not self.temperature:
            return growth
        return Growth(growth.units, tempered(growth.scores, self.temperature, rng))


def largest_gradients(view: LayerView) -> Growth:
    """The units whose gradients were looked at; of a dense gradient, those that are dropped as well."""
    assert view.sample_gradient is not None
    from sparsae.core.host import on_device

    returning = None if view.active_gradient is None else unit_magnitude(view.active_gradient)
    units = on_device(sample_of(view), view.topology.indices.device)
    return Growth(units, unit_magnitude(view.sample_gradient), returning)


def tempered(magnitude: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """2 log(magnitude) with Gumbel noise: the largest are a draw without replacement, odds magnitude^(2/temperature).

    (Gumbel top-k: Kool et al., 2019.) A magnitude of zero stays -inf.
    """
    import torch

    from sparsae.core.host import on_device

    keys = 2 * magnitude.double().log()
    if temperature:
        # -log(-log U) with U in (0, 1).
        noise = torch.rand(keys.shape, generator=rng, dtype=torch.float64, device="cpu").clamp_(min=1e-300)
        keys += on_device(temperature * -(-noise.log()).log(), keys.device)
    return keys


def with_random(view: LayerView, growth: Growth, n: int, rng: torch.Generator) -> Growth:
    """The candidates of `growth` after `n` uniformly random inactive units, which are grown before all others.

    Where limits of groups have no room for one of these, the best of the others are grown instead.
    """
    import torch

    if not n:
        return growth
    random = view.topology.sample_inactive(n, rng).to(growth.units)
    # Nothing is twice in either, and who does not say so waits for the numbers of what is left.
    (others,) = torch.isin(growth.units, random, assume_unique=True, invert=True).nonzero(as_tuple=True)
    first = torch.full((n,), torch.inf, dtype=growth.scores.dtype, device=growth.scores.device)
    return Growth(
        torch.cat([random, growth.units[others]]), torch.cat([first, growth.scores[others]]), growth.returning
    )


def sample_of(view: LayerView) -> Tensor:
    """The sampled units of a layer, of a rule that takes a sample."""
    assert view.sample is not None
    return view.sample
