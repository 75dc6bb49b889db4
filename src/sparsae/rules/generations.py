"""Generations of connections: random variation, protected infancy, selection by size. The rule of the method `sparsae`.

The individuals are connections. At the end of each generation, every K steps, in each layer l:

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    selection: the k_l smallest |w| go
    variation: k_l inactive units come, uniformly, at zero

    infancy: a connection of age a, in steps, learns at min(1, a / ramp) of the learning rate

With infancy off this is SET (set.py) under other defaults. What a connection is worth cannot be known when it is born:
one that starts at zero leaves the function as it is. So it is drawn blindly, grows up without the full step that Adam
takes for whatever is new, and is judged by the size that it has reached a generation later.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sparsae.config.rules import RuleConfig
from sparsae.config.section import Share
from sparsae.config.span import RampSpan, Span
from sparsae.core.cadence import Periodic
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import RandomGrowth


class GenerationsConfig(RuleConfig):
    """Generations: small connections go, random ones come and ramp up."""

    every: Span = Field(default="2%", description="K, the length of a generation: steps, 5%, 1 epoch")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3, description="alpha, share of a layer's connections moved by the first update; cosine decay"
    )
    ramp: RampSpan = Field(
        default="1 update",
        description="infancy: over how long a grown connection's learning rate rises to its own: steps, 5%, 2 updates; "
        "0: none",
    )


@RULES.register("generations", GenerationsConfig)
def build_generations(config: GenerationsConfig) -> Exchange:
    """Magnitude drop, random growth."""
    return Exchange(
        "generations",
        when=Periodic(config.every, stop=config.stop),
        fraction=CosineFraction(config.drop_fraction, config.stop),
        drop=SmallestMagnitude(),
        grow=RandomGrowth(),
    )
