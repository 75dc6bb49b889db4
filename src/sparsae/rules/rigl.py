"""RigL: growth where the dense gradient is largest (Evci et al., 2020).

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    D = ArgTopK(-|theta_l|, k_l)                                        drop: the smallest weights of layer l
    G = ArgTopK(|dL/dTheta_l|_i over i not in theta_l - D, k_l)         grow: the largest gradients

What was dropped (D) is among what may be grown. A weight in both D and G was never away: it keeps its value and its
moments, as in the reference code (the paper sets "newly activated" weights to zero, and this one was active). So what
is in D alone is dropped, and what is in G alone is grown, at zero.

The gradient is that of the training batch before the update. In the paper, and in the reference code, an update takes
the place of that batch's optimizer step; here the step is made as well, and weights are compared after it. The
reference code adds noise (deviation 1e-5) to the weights' magnitudes; here the first of equals is taken.

One layer's dense gradient exists at a time, inside its own backward pass. With gradient accumulation that of the last
micro-batch counts; "sum" takes all, and keeps every layer's dense gradient until the step ends.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsae.config.rules import GradientWindow, RandomShare, RuleConfig, WindowEvery
from sparsae.config.section import Share
from sparsae.config.span import Span
from sparsae.core.cadence import Periodic, Window
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import LargestGradient


class RiglConfig(RuleConfig):
    """RigL: drops the smallest weights, grows where the dense gradient is largest (Evci et al., 2020)."""

    every: Span = Field(default=100, description="between updates: steps, 5%, 1 epoch")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3,
        description="alpha, share of a layer's connections dropped and grown by the first update; cosine decay",
    )
    accumulate: Literal["last", "sum"] = Field(
        default="last",
        description="dense gradient of the last micro-batch, or their sum, which keeps every layer's in memory",
    )
    window: GradientWindow = 1
    window_every: WindowEvery = 1
    random_share: RandomShare = 0.0


@RULES.register("rigl", RiglConfig)
def build_rigl(config: RiglConfig) -> Exchange:
    """Magnitude drop, growth by the dense gradient."""
    return Exchange(
        "rigl",
        when=Periodic(config.every, stop=config.stop),
        fraction=CosineFraction(config.drop_fraction, config.stop),
        drop=SmallestMagnitude(),
        grow=LargestGradient(config.accumulate, Window(config.window, config.window_every)),
        random_share=config.random_share,
    )
