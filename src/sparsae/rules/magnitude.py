"""One-shot magnitude pruning: train dense, drop all but the largest weights once, continue training (Han et al., 2015).

Han et al. set a threshold a layer and may repeat; here the threshold is that which leaves exactly the model's budget,
over the whole model ("global") or in each layer ("local").
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsae.config.rules import RuleConfig, StartSparsity
from sparsae.core.cadence import Once
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.pruning import Pruning


class MagnitudeConfig(RuleConfig):
    """One-shot magnitude pruning: drops all but the largest weights once, then trains on (Han et al., 2015)."""

    start_sparsity: StartSparsity = Field(default=0.0, description="sparsity of the first model; 0: every connection")
    at: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.5, description="share of the run after which the model is pruned"
    )
    scope: Literal["global", "local"] = Field(
        default="global", description="the model's smallest weights, or each layer down to its own budget"
    )


@RULES.register("magnitude", MagnitudeConfig)
def build_magnitude(config: MagnitudeConfig) -> Pruning:
    """Magnitude drop without growth, once."""
    return Pruning("magnitude", when=Once(config.at), drop=SmallestMagnitude(), scope=config.scope)
