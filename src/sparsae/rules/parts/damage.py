"""Where dropping is cheap: the loss with the weakest connections of one layer left out, layer by layer.

    d_l = (L without the weakest f k_l units of layer l - L) / (f k_l)             damage of a unit of layer l, in nats
    factor_l <- factor_l (d_l / mean d)^rate, within [1 / limit, limit]

The layers' counts then move towards the first ones times their factors, from where dropping costs little to where it
costs much. Units are left out by an exchange for new ones, which start at zero and leave the function as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsae.config.section import NonNegative, Section
from sparsae.core.observation import LayerView
from sparsae.core.swap import Swap
from sparsae.rules.parts.grow import RandomGrowth
from sparsae.rules.parts.rule import Candidate

if TYPE_CHECKING:
    import torch

_EXTREME = 4.0  # by which factor a layer's damage may be off the mean before it is taken for noise


class DamageConfig(Section):
    """Densities that move by measured damage."""

    every: Annotated[int, Field(ge=0, le=100_000)] = Field(
        default=0, description="updates between measurements, each of a forward pass a layer; 0: none is made"
    )
    share: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        default=0.1, description="share of a layer's connections, the weakest, that is left out"
    )
    rate: NonNegative = Field(default=0.25, description="exponent with which a layer's density follows its damage")
    limit: Annotated[float, Field(ge=1.0, le=100.0)] = Field(
        default=2.0, description="largest factor on a layer's first density, and its inverse the smallest"
    )


def damage_probes(views: Mapping[str, LayerView], share: float, rng: torch.Generator) -> list[tuple[str, Candidate]]:
    """For each layer the candidate without its weakest units, as far as its groups allow; none of one without room."""
    from sparsae.core.ranking import smallest
    from sparsae.rules.parts.choose import in_layer

    found, growth = [], RandomGrowth()
    for name, view in views.items():
        if n := min(max(1, int(share * view.topology.count)), view.topology.count, growth.room(view)):
            scores = view.magnitude
            candidates = growth.candidates(view, smallest(scores, n), n, rng)
            drop, grow = in_layer(view, scores, n, candidates)
            found.append((name, Candidate(Swap({name: drop}, {name: grow}), f"damage of {name}", is_probe=True)))
    return found


def damage_factors(factors: Mapping[str, float], damage: Mapping[str, float], config: DamageConfig) -> dict[str, float]:
    """The factors of the layers of which the damage of a unit was measured."""
    known = {name: max(0.0, each) for name, each in damage.items() if math.isfinite(each)}
    mean = math.fsum(known.values()) / len(known) if known else 0.0
    if not mean > 0.0:
        return {}

    def moved(name: str) -> float:
        ratio = min(max(known[name] / mean, 1.0 / _EXTREME), _EXTREME)
        return min(max(factors.get(name, 1.0) * ratio**config.rate, 1.0 / config.limit), config.limit)

    return {name: moved(name) for name in known}
