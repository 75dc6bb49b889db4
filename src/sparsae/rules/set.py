"""SET: sparse evolutionary training (Mocanu et al., 2018), on RigL's schedule (Evci et al., 2020).

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    drop: the k_l smallest |w| of layer l
    grow: k_l of its inactive units, uniformly; they start at zero

Mocanu et al. drop the same share of the smallest positive and of the largest negative weights, once an epoch, at a
constant rate; comparisons since Evci et al. use |w| and the schedule above. A unit cannot be dropped and regrown by one
update: what grows was inactive before it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sparsae.config.rules import RuleConfig
from sparsae.config.section import Share
from sparsae.config.span import Span
from sparsae.core.cadence import Periodic
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import RandomGrowth


class SetConfig(RuleConfig):
    """SET: drops the smallest weights, grows random ones (Mocanu et al., 2018)."""

    every: Span = Field(default=100, description="between updates: steps, 5%, 1 epoch")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3,
        description="alpha, share of a layer's connections dropped and grown by the first update; cosine decay",
    )


@RULES.register("set", SetConfig)
def build_set(config: SetConfig) -> Exchange:
    """Magnitude drop, random growth."""
    return Exchange(
        "set",
        when=Periodic(config.every, stop=config.stop),
        fraction=CosineFraction(config.drop_fraction, config.stop),
        drop=SmallestMagnitude(),
        grow=RandomGrowth(),
    )
