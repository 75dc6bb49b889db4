"""MEST: memory-economic sparse training by elastic mutation (Yuan et al., 2021).

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    drop: the k_l smallest |theta| + lambda |dL/dtheta| of layer l
    grow: k_l of its inactive units, uniformly; they start at zero

A small weight with a large gradient is still changing, and stays. The gradient is that of the step before the update.
In the paper the fraction falls in stages that are set by hand; here it falls as in RigL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsae.config.rules import RuleConfig
from sparsae.config.section import NonNegative, Share
from sparsae.config.span import Span
from sparsae.core.cadence import Periodic
from sparsae.core.observation import LayerView, unit_magnitude
from sparsae.registry import RULES
from sparsae.rules.parts.drop import Drop
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import RandomGrowth

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.observation import Need


class MestConfig(RuleConfig):
    """MEST: drops weights that are small and have small gradients, grows random ones (Yuan et al., 2021)."""

    every: Span = Field(default=100, description="between updates: steps, 5%, 1 epoch")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3,
        description="alpha, share of a layer's connections dropped and grown by the first update; cosine decay",
    )
    gradient_weight: NonNegative = Field(default=0.01, description="lambda, weight of the gradient beside the weight")


@dataclass(frozen=True)
class SmallestWithGradient(Drop):
    """|w| + lambda |dL/dw|, or the L2 norms of a block's."""

    weight: float

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradient"})

    def scores(self, view: LayerView, rng: torch.Generator) -> Tensor:
        assert view.gradient is not None
        return view.magnitude + self.weight * unit_magnitude(view.gradient)


@RULES.register("mest", MestConfig)
def build_mest(config: MestConfig) -> Exchange:
    """Drop by magnitude and gradient, random growth."""
    return Exchange(
        "mest",
        when=Periodic(config.every, stop=config.stop),
        fraction=CosineFraction(config.drop_fraction, config.stop),
        drop=SmallestWithGradient(config.gradient_weight),
        grow=RandomGrowth(),
    )
