"""Random growth, a learning rate that ramps up, and selection by magnitude. The rule of the method `sparsae`.

A generation is K steps. At its end, in each layer l:

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    drop: the k_l smallest |w|
    grow: k_l inactive units, uniformly; they start at zero

    (or, with random_share < 1, that share of them, and of a random sample those with the largest |dL/dW|)

    ramp: a weight that was grown a steps ago learns at min(1, a / ramp) of the learning rate

Without the ramp this is SET (set.py) under other defaults. What a connection is worth cannot be known when it is grown:
one that starts at zero leaves the function as it is. So it is drawn at random, is spared the full step that Adam takes
for whatever is new, and competes by the magnitude that it has a generation later.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from sparsae.config.effect import Idle
from sparsae.config.rules import GradientWindow, RuleConfig, WindowEvery, evolves
from sparsae.config.section import NonNegative, Positive, Share
from sparsae.config.span import RampSpan, Span
from sparsae.core.cadence import Periodic, Window
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.evolved import Evolved, genes_of
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import LargestSampledGradient, RandomGrowth
from sparsae.rules.parts.strategy import StrategyConfig

_RANDOM = Idle(
    lambda rule, _: rule.random_share == 1.0 and not evolves(rule, "random_share"),
    "random_share is 1: what is grown is random, and no gradient is looked at",
)
_OF_DAMAGE = ("fitness", "damage", "sequences")


class GenerationsConfig(RuleConfig):
    """Drops the smallest weights, grows random ones, whose learning rate then ramps up to that of all others."""

    every: Span = Field(
        default="2%", description="K, between updates: steps, 5%, 1 epoch; a share gives at least 10 steps"
    )
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3,
        description="alpha, share of a layer's connections dropped and grown by the first update; cosine decay",
    )
    ramp: RampSpan = Field(
        default="1 update",
        description="over how long a grown connection's learning rate rises to that of all others: steps, 5%, "
        "2 updates; 0: none",
    )
    random_share: Share = Field(
        default=1.0,
        description="share of what is grown that is uniformly random; the rest has the largest gradients of a sample",
    )
    sample_ratio: Annotated[Positive, _RANDOM] = Field(
        default=1.0, description="gamma, sampled inactive positions in terms of nnz, of growth by gradients"
    )
    window: Annotated[GradientWindow, _RANDOM] = 1
    window_every: Annotated[WindowEvery, _RANDOM] = 1
    grow_temperature: Annotated[NonNegative, _RANDOM] = Field(
        default=0.0, description="Gumbel noise on 2 log|g| of growth by gradients; 0: largest first"
    )
    strategy: Annotated[
        StrategyConfig,
        Idle(lambda rule, _: rule.strategy.fitness == "none", "strategy.fitness is none", but=_OF_DAMAGE),
    ] = StrategyConfig()

    @model_validator(mode="after")
    def _has_its_genes(self) -> Self:
        if self.strategy.is_on:
            genes_of(self.strategy, self)
        return self


@RULES.register("generations", GenerationsConfig)
def build_generations(config: GenerationsConfig) -> Exchange | Evolved:
    """The rule of fixed numbers, or of ones that evolve."""
    if config.strategy.is_on:
        return Evolved(config, config.strategy, _exchange)
    return _exchange(config)


def _exchange(config: GenerationsConfig) -> Exchange:
    """Magnitude drop, and growth that is random, or guided by a sample's gradients in part."""
    window = Window(config.window, config.window_every)
    guided = LargestSampledGradient(config.sample_ratio, window=window, temperature=config.grow_temperature)
    is_random = config.random_share == 1.0
    return Exchange(
        "generations",
        when=Periodic(config.every, stop=config.stop),
        fraction=CosineFraction(config.drop_fraction, config.stop),
        drop=SmallestMagnitude(),
        grow=RandomGrowth() if is_random else guided,
        random_share=0.0 if is_random else config.random_share,
    )
