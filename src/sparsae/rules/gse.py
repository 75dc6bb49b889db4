"""GSE: guided stochastic exploration (Heddes et al., 2024).

With k = floor(f_t nnz) and f_t = alpha / 2 (1 + cos(pi t / T_end)), over the model ("global") or each layer ("local"):

    S: about gamma nnz_l inactive positions of each layer l, drawn at random
    grow: the k positions of S with the largest |dL/dW|, computed there and nowhere else; they start at zero
    drop: the k smallest |w| of what was active before; what has just grown is protected

An input i and an output j are drawn independently, with probabilities p_i and q_j; X is (tokens, in), dY (tokens, out):

    uniform    p and q are even
    GraBo      p_i ~ sum_t |X_ti|,      q_j ~ sum_t |dY_tj|
    GraEst     p_i ~ |sum_t s_t X_ti|,  q_j ~ |sum_t s_t dY_tj|,    s_t = +1 or -1 at random

GraBo draws by a bound: |dL/dW_ji| <= sum_t |dY_tj| |X_ti|. GraEst draws by an estimate: the product of its two sums has
the mean dL/dW_ji. Pairs are drawn with replacement, from the batch of the first backward pass before the update;
repeated and active ones are discarded. "uniform" draws min(gamma nnz_l, inactive) distinct inactive positions instead.
Time and memory of a layer are O(tokens (in + out + nnz)), up to logarithms; nothing has its dense weight's size.

The reference code simulates with masks: it computes dense gradients, on batches of their own, and looks at every
position of a layer that is at least half dense. It knows no bounds on layers; here layers, heads and neurons keep
theirs, and where the global ranking would break them, the next smallest weights of others are dropped.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsae.config.rules import GradientWindow, RandomShare, RuleConfig, WindowEvery
from sparsae.config.section import Positive, Share
from sparsae.config.span import Span
from sparsae.core.cadence import Periodic, Window
from sparsae.registry import RULES
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import LargestSampledGradient


class GseConfig(RuleConfig):
    """GSE: drops the smallest weights, grows where the gradient is largest in a random sample (Heddes et al., 2024)."""

    every: Span = Field(default=1000, description="between updates: steps, 5%, 1 epoch")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.6, description="share of the run at which the rate is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.2, description="alpha, share of the connections dropped and grown by the first update; cosine decay"
    )
    sampling: Literal["uniform", "grabo", "graest"] = Field(
        default="uniform",
        description="how the subset is drawn: evenly, by the size of activations and output gradients, or by a random "
        "estimate of the gradient",
    )
    sample_ratio: Positive = Field(default=1.0, description="gamma, positions drawn in terms of a layer's nnz")
    scope: Literal["global", "local"] = Field(
        default="global", description="compare gradients and weights over the model, or within each layer"
    )
    window: GradientWindow = 1
    window_every: WindowEvery = 1
    random_share: RandomShare = 0.0


@RULES.register("gse", GseConfig)
def build_gse(config: GseConfig) -> Exchange:
    """Grow the largest gradients of a sample, and drop the smallest of the weights that were there before."""
    return Exchange(
        "gse",
        when=Periodic(config.every, stop=config.stop),
        fraction=CosineFraction(config.drop_fraction, config.stop),
        drop=SmallestMagnitude(),
        grow=LargestSampledGradient(config.sample_ratio, config.sampling, Window(config.window, config.window_every)),
        scope=config.scope,
        random_share=config.random_share,
    )
