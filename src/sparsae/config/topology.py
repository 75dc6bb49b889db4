"""The settings of every topology rule, one class a rule.

A value that a paper fixes is the default; docs/method.md has the formulas. A rule that prunes starts at
`start_sparsity` and ends at the model's sparsity; every other one keeps the model's sparsity throughout.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsae.config.section import LARGEST, Count, Counts, NonNegative, Positive, Section, Share, Shares

StartSparsity = Annotated[float, Field(ge=0.0, lt=1.0)]


class StaticConfig(Section):
    """The topology that was drawn first stays."""

    rule: Literal["static"] = Field(default="static", description="static: the first topology stays")


class SetConfig(Section):
    """SET: small weights go, random ones come (Mocanu et al., 2018)."""

    rule: Literal["set"] = Field(default="set", description="set: magnitude drop, random growth")
    every: Count = Field(default=100, description="steps between updates")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3, description="alpha, share of a layer's connections moved by the first update; cosine decay"
    )


class RiglConfig(Section):
    """RigL: small weights go, the largest dense gradients come (Evci et al., 2020)."""

    rule: Literal["rigl"] = Field(default="rigl", description="rigl: magnitude drop, growth by the dense gradient")
    every: Count = Field(default=100, description="steps between updates")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the drop fraction is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.3, description="alpha, share of a layer's connections moved by the first update; cosine decay"
    )
    accumulate: Literal["last", "sum"] = Field(
        default="last",
        description="dense gradient of the last micro-batch, or their sum, which keeps every layer's in memory",
    )


class GseConfig(Section):
    """GSE: the largest gradients of a sampled subset come, then small weights go (Heddes et al., 2024)."""

    rule: Literal["gse"] = Field(default="gse", description="gse: guided stochastic exploration")
    every: Count = Field(default=1000, description="steps between updates")
    stop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.75, description="share of the run at which the rate is 0 and updates end"
    )
    drop_fraction: Share = Field(
        default=0.2, description="alpha, share of the connections moved by the first update; cosine decay"
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


class GmpConfig(Section):
    """Gradual magnitude pruning by a cubic schedule (Zhu & Gupta, 2017)."""

    rule: Literal["gmp"] = Field(default="gmp", description="gmp: gradual magnitude pruning")
    start_sparsity: StartSparsity = Field(default=0.0, description="sparsity of the first model; 0: every connection")
    every: Count = Field(default=100, description="steps between prunings")
    start: Share = Field(default=0.25, description="share of the run at which pruning begins")
    stop: Share = Field(default=0.75, description="share of the run at which sparsity.sparsity is reached")
    scope: Literal["local", "global"] = Field(
        default="local", description="each layer on its way to its own budget, or the model's smallest weights"
    )

    @model_validator(mode="after")
    def _start_comes_first(self) -> Self:
        _require_order(self.start, self.stop)
        return self


class GranetConfig(Section):
    """GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al., 2021)."""

    rule: Literal["granet"] = Field(default="granet", description="granet: gradual pruning that regenerates")
    start_sparsity: StartSparsity = Field(default=0.5, description="sparsity of the first model; 0: every connection")
    every: Count = Field(default=100, description="steps between prunings")
    start: Share = Field(default=0.25, description="share of the run at which pruning begins")
    stop: Share = Field(default=0.75, description="share of the run at which sparsity.sparsity is reached")
    scope: Literal["global", "local"] = Field(
        default="global", description="the model's smallest weights, or each layer on its way to its own budget"
    )
    regeneration: Share = Field(
        default=0.5,
        description="r, share of a layer's connections regenerated, at the start; cosine decay over the run",
    )
    accumulate: Literal["last", "sum"] = Field(
        default="last",
        description="dense gradient of the last micro-batch, or their sum, which keeps every layer's in memory",
    )

    @model_validator(mode="after")
    def _start_comes_first(self) -> Self:
        _require_order(self.start, self.stop)
        return self


class MagnitudeConfig(Section):
    """One-shot magnitude pruning of a trained model, then fine-tuning (Han et al., 2015)."""

    rule: Literal["magnitude"] = Field(default="magnitude", description="magnitude: prune once, then go on")
    start_sparsity: StartSparsity = Field(default=0.0, description="sparsity of the first model; 0: every connection")
    at: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.5, description="share of the run after which the model is pruned"
    )
    scope: Literal["global", "local"] = Field(
        default="global", description="the model's smallest weights, or each layer down to its own budget"
    )


class ProxyConfig(Section):
    """P = w1 CE + w2 diversity - w3 activity; lower is better."""

    loss_weight: NonNegative = Field(
        default=1.0, description="w1, weight of the cross entropy on the micro-batch (nats)"
    )
    diversity_weight: NonNegative = Field(
        default=0.01, description="w2, weight of the deviation of densities over layers and heads"
    )
    activity_weight: NonNegative = Field(
        default=0.005, description="w3, weight of the mean gradient norm of the layers"
    )
    standardize: bool = Field(default=False, description="standardize each component by its running mean and deviation")
    anneal: Literal["none", "linear", "cosine"] = Field(
        default="none", description="how w2 and w3 go to 0 over the run"
    )
    activity: Literal["candidate", "training", "moments"] = Field(
        default="moments",
        description="gradient norms come from the candidate's backward pass, the last training step, or Adam's moments",
    )


class MicroBatchConfig(Section):
    """The held-out sequences that score candidates; all candidates of one update see the same ones."""

    mode: Literal["static", "resampled", "pooled"] = Field(
        default="resampled", description="one batch for the run, a new one an update, or one of a pool"
    )
    sequences: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="sequences in a micro-batch")
    pool: Annotated[int, Field(ge=1, le=4096)] = Field(default=8, description="micro-batches in the pool (pooled)")
    study: bool = Field(
        default=False,
        description="also score candidates on all validation text, to compare; counted apart from training",
    )


class ResetConfig(Section):
    """Conditional global resets: a candidate that is a large jump."""

    probability: Share = Field(default=0.0, description="p_reset, probability that a candidate is a global reset")
    reshuffle: Shares = Field(default=(0.05, 0.10), description="share of the connections that a reshuffle moves")
    redraw: Share = Field(
        default=0.5, description="probability that a reset is a new Erdos-Renyi topology instead of a reshuffle"
    )
    patience: Count = Field(
        default=5, description="updates without a better micro-batch perplexity before resets become likelier"
    )
    boosted_probability: Share = Field(default=0.0, description="p_reset while boosted")
    boosted_updates: Count = Field(default=2, description="updates that a boost lasts")


class AdaptationConfig(Section):
    """lambda and p_mutate follow recent success."""

    enabled: bool = Field(default=False, description="let success shrink, and stagnation grow, lambda and p_mutate")
    patience: Count = Field(default=2, description="updates in a row of the same outcome before they move")
    factor: Annotated[float, Field(gt=1.0)] = Field(
        default=1.25, description="factor by which p_mutate moves; lambda moves by 1"
    )
    candidates: Counts = Field(default=(2, 5), description="range of lambda")
    mutation_rate: Shares = Field(default=(0.001, 0.01), description="range of p_mutate")


class BurnInConfig(Section):
    """Gradient steps for regrown weights after a change."""

    steps: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        default=0, description="N_burn_in, gradient steps after an accepted change; 0: none"
    )
    multiplier: Positive = Field(
        default=1.5, description="learning rate of new connections in terms of the base learning rate"
    )
    scope: Literal["new", "all"] = Field(
        default="all", description="what moves: only new connections, or everything with the multiplier on the new"
    )


class EvolutionConfig(Section):
    """The (1+lambda) or (1,lambda) evolution strategy over topologies."""

    rule: Literal["evolution"] = Field(default="evolution", description="evolution: search by an evolution strategy")
    every: Count | None = Field(
        default=None, description="K, steps between updates; null: a twentieth of the run, at least 10"
    )
    start: Share = Field(default=0.0, description="share of the run before the first update")
    stop: Share = Field(default=0.9, description="share of the run after which the topology stays")
    candidates: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="lambda, candidates an update")
    selection: Literal["elitist", "comma"] = Field(
        default="comma",
        description="whether the current topology competes (elitist) or the best candidate always replaces it (comma)",
    )
    proposer: Literal["uniform", "layerwise", "guided", "shift", "rigl"] = Field(
        default="guided",
        description="random swaps over the model or per layer, guided by size and sampled or (rigl) dense gradients, "
        "or shifts between layers",
    )
    mutation_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.3, description="p_mutate, share of connections a candidate moves"
    )
    mutation_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how p_mutate goes from start to stop"
    )
    drop_temperature: NonNegative = Field(
        default=1.0, description="Gumbel noise on 2 log|w| when a guided proposal drops; 0: smallest first"
    )
    grow_temperature: NonNegative = Field(
        default=0.0, description="Gumbel noise on 2 log|g| when a guided proposal grows; 0: largest first"
    )
    sample_ratio: Positive = Field(
        default=1.0, description="gamma, sampled inactive positions a guided proposal sees, in terms of nnz"
    )
    initialization: Literal["zero", "kaiming_uniform", "normal"] = Field(
        default="zero", description="values of new connections; normal: as the layer's first ones were drawn"
    )
    redraws: Count = Field(default=20, description="draws before a candidate that keeps leaving the bounds is given up")
    proxy: ProxyConfig = ProxyConfig()
    micro_batch: MicroBatchConfig = MicroBatchConfig()
    reset: ResetConfig = ResetConfig()
    adaptation: AdaptationConfig = AdaptationConfig()
    burn_in: BurnInConfig = BurnInConfig()

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        _require_order(self.start, self.stop)
        for name, (low, high) in {
            "reset.reshuffle": self.reset.reshuffle,
            "adaptation.candidates": self.adaptation.candidates,
            "adaptation.mutation_rate": self.adaptation.mutation_rate,
        }.items():
            if low > high:
                raise ValueError(f"{name} [{low:g}, {high:g}] must be given lowest first")
        return self


# What a rule prunes from; the others keep the number of active connections.
PruningConfig = GmpConfig | GranetConfig | MagnitudeConfig

RuleConfig = Annotated[
    StaticConfig | EvolutionConfig | SetConfig | RiglConfig | GseConfig | PruningConfig, Field(discriminator="rule")
]


def is_elitist(config: RuleConfig) -> bool:
    """Whether an update may leave the topology as it is, because none of its candidates beats it."""
    return config.rule == "evolution" and config.selection == "elitist"


def _require_order(start: float, stop: float) -> None:
    if start >= stop:
        raise ValueError(f"start {start:g} must come before stop {stop:g}")
