"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al., 2021).

At each step of the cubic schedule (Zhu & Gupta, 2017; see gmp.py), from k_start to k_end units:

    prune: the smallest |w| are dropped, until k_t units are left (over the whole model, or "local" in each layer)
    regenerate, in each layer, with k_l = floor(r_t nnz_l) of what is left:
        drop the k_l smallest |w|, grow the k_l inactive units with the largest |gradient|, at zero

with r_t = r / 2 (1 + cos(pi t / T)). As in RigL, what was just dropped may be grown again, and a weight that is both
keeps its value and moments. Without regeneration it is GMP. The reference code continues to regenerate after the
schedule's end, until the end of the training; the paper does so within it. Its scripts begin at the first epoch and end
after 80 of 160 on CIFAR, which are the shares here, and after 30 of 100 on ImageNet.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsae.config.effect import Idle
from sparsae.config.rules import RuleConfig, StartSparsity, require_order
from sparsae.config.section import Share
from sparsae.config.span import Span
from sparsae.core.cadence import Cubic
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction
from sparsae.rules.parts.grow import LargestGradient
from sparsae.rules.parts.pruning import Pruning


class GranetConfig(RuleConfig):
    """GraNet: prunes the smallest weights little by little, and exchanges some as RigL does (Liu et al., 2021)."""

    start_sparsity: StartSparsity = Field(default=0.5, description="sparsity of the first model; 0: every connection")
    every: Span = Field(default=100, description="between prunings: steps, 5% (at least 10 steps), 1 epoch")
    start: Share = Field(default=0.0, description="share of the run at which pruning begins")
    stop: Share = Field(default=0.5, description="share of the run at which sparsity.sparsity is reached")
    scope: Literal["global", "local"] = Field(
        default="global", description="the model's smallest weights, or each layer on its way to its own budget"
    )
    regeneration: Share = Field(
        default=0.5,
        description="r, share of a layer's connections dropped and grown elsewhere at first; cosine decay over the run",
    )
    accumulate: Annotated[
        Literal["last", "sum"], Idle(lambda rule, _: not rule.regeneration, "regeneration is 0: nothing is grown")
    ] = Field(
        default="last",
        description="dense gradient of the last micro-batch, or their sum, which keeps every layer's in memory",
    )

    @model_validator(mode="after")
    def _start_comes_first(self) -> Self:
        require_order(self.start, self.stop)
        return self


@RULES.register("granet", GranetConfig)
def build_granet(config: GranetConfig) -> Pruning:
    """Magnitude drop by a cubic schedule, and a magnitude drop with as much growth by the dense gradient."""
    return Pruning(
        "granet",
        when=Cubic(config.start, config.stop, config.every),
        drop=SmallestMagnitude(),
        scope=config.scope,
        fraction=CosineFraction(config.regeneration),
        grow=LargestGradient(config.accumulate),
    )
