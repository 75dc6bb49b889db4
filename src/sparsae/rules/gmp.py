"""GMP: gradual magnitude pruning (Zhu & Gupta, 2017).

    k_t = k_end + (k_start - k_end) (1 - (t - t_0) / (t_1 - t_0))^3

At t = t_0, t_0 + every, ... and t_1 the smallest |w| are dropped, until k_t units are left; none is
grown. "local" is the
paper: each layer follows the schedule, from its first to its last number of units, which the budget gives (the paper's
layers have one sparsity: `sparsity.budget=uniform`). "global" ranks the weights of all layers together; no layer falls
below its k_min. What is pruned is deleted from values, optimizer and teacher, and the steps that follow cost less.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sparsae.config.rules import RuleConfig, StartSparsity, require_order
from sparsae.config.section import Share
from sparsae.config.span import Span
from sparsae.core.cadence import Cubic
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.pruning import Pruning


class GmpConfig(RuleConfig):
    """GMP: drops the smallest weights little by little, grows none: gradual magnitude pruning (Zhu & Gupta, 2017)."""

    start_sparsity: StartSparsity = Field(default=0.0, description="sparsity of the first model; 0: every connection")
    every: Span = Field(default=100, description="between prunings: steps, 5% (at least 10 steps), 1 epoch")
    start: Share = Field(default=0.25, description="share of the run at which pruning begins")
    stop: Share = Field(default=0.75, description="share of the run at which sparsity.sparsity is reached")
    scope: Literal["local", "global"] = Field(
        default="local", description="each layer on its way to its own budget, or the model's smallest weights"
    )

    @model_validator(mode="after")
    def _start_comes_first(self) -> Self:
        require_order(self.start, self.stop)
        return self


@RULES.register("gmp", GmpConfig)
def build_gmp(config: GmpConfig) -> Pruning:
    """Magnitude drop without growth, by a cubic schedule."""
    when = Cubic(config.start, config.stop, config.every)
    return Pruning("gmp", when=when, drop=SmallestMagnitude(), scope=config.scope)
