"""Topology search by a (1+lambda) or (1,lambda) evolution strategy.

Every K steps lambda candidates are proposed, scored on one micro-batch by the terms of the proxy (`parts/proxy.py`) and
compared, with the current topology (elitist) or among themselves (comma). A candidate is now and then a global reset,
more often after a plateau; lambda and p_mutate follow recent success.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.effect import Idle
from sparsae.config.rules import (
    BurnInConfig,
    GradientWindow,
    MicroBatchConfig,
    RandomShare,
    RuleConfig,
    WindowEvery,
    require_order,
)
from sparsae.config.section import Count, Counts, NonNegative, Positive, Section, Share, Shares
from sparsae.config.span import Horizon, Span
from sparsae.core.cadence import Periodic, Window, decayed
from sparsae.core.observation import Need, Observation
from sparsae.core.swap import Swap
from sparsae.errors import InputError
from sparsae.registry import RULES
from sparsae.rules.parts.proxy import ProxyConfig
from sparsae.rules.parts.rule import Candidate, Decision, Rule
from sparsae.score import Moments, Running, Score, is_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology

Number = TypeVar("Number", int, float)


_NO_RESET = Idle(lambda reset, _: not reset.happens, "probability and boosted_probability are 0: nothing is reset")
_NO_BOOST = Idle(lambda reset, _: not reset.boosted_probability, "boosted_probability is 0")


class ResetConfig(Section):
    """Conditional global resets: a candidate that is a large jump."""

    probability: Share = Field(default=0.0, description="p_reset, probability that a candidate is a global reset")
    reshuffle: Annotated[Shares, _NO_RESET] = Field(
        default=(0.05, 0.10), description="share of the connections that a reshuffle exchanges"
    )
    redraw: Annotated[Share, _NO_RESET] = Field(
        default=0.5, description="probability that a reset is a new Erdos-Renyi topology instead of a reshuffle"
    )
    patience: Annotated[Count, _NO_BOOST] = Field(
        default=5, description="updates without a better micro-batch perplexity before resets become likelier"
    )
    boosted_probability: Share = Field(default=0.0, description="p_reset while boosted")
    boosted_updates: Annotated[Count, _NO_BOOST] = Field(default=2, description="updates that a boost lasts")

    @property
    def happens(self) -> bool:
        """Whether any candidate is ever a reset."""
        return self.probability > 0 or self.boosted_probability > 0


class AdaptationConfig(Section):
    """lambda and p_mutate follow recent success."""

    enabled: bool = Field(default=False, description="let success shrink, and stagnation grow, lambda and p_mutate")
    patience: Count = Field(default=2, description="updates in a row of the same outcome before they move")
    factor: Annotated[float, Field(gt=1.0)] = Field(
        default=1.25, description="factor by which p_mutate moves; lambda moves by 1"
    )
    candidates: Counts = Field(default=(2, 5), description="range of lambda")
    mutation_rate: Shares = Field(default=(0.001, 0.01), description="range of p_mutate")


_UNGUIDED = Idle(
    lambda rule, _: rule.proposer not in ("guided", "rigl"), "proposer is neither guided nor rigl: proposals are random"
)


_NO_SAMPLE = Idle(lambda rule, _: rule.proposer != "guided", "proposer is not guided")
_ALONE = Idle(
    lambda rule, _: not rule.compares,
    "one candidate, which always replaces what there is, is not compared with anything",
)
_STEADY = Idle(lambda rule, _: not rule.adaptation.enabled, "adaptation.enabled is false", but=("enabled",))


class EvolutionConfig(RuleConfig):
    """Proposes several topologies, scores them on held-out text, takes the best: an evolution strategy (1+/,lambda)."""

    every: Span | None = Field(
        default=None, description="K, between updates: steps, 5%, 1 epoch; null: a twentieth of the run, at least 10"
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
        default=0.3, description="p_mutate, share of the connections that a candidate exchanges"
    )
    mutation_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how p_mutate changes from start to stop"
    )
    drop_temperature: Annotated[NonNegative, _UNGUIDED] = Field(
        default=1.0, description="Gumbel noise on 2 log|w| when a guided proposal drops; 0: smallest first"
    )
    grow_temperature: Annotated[NonNegative, _UNGUIDED] = Field(
        default=0.0, description="Gumbel noise on 2 log|g| when a guided proposal grows; 0: largest first"
    )
    sample_ratio: Annotated[Positive, _NO_SAMPLE] = Field(
        default=1.0, description="gamma, sampled inactive positions a guided proposal sees, in terms of nnz"
    )
    window: Annotated[GradientWindow, _UNGUIDED] = 1
    window_every: Annotated[WindowEvery, _UNGUIDED] = 1
    random_share: Annotated[RandomShare, _UNGUIDED] = 0.0
    initialization: Literal["zero", "kaiming_uniform", "normal"] = Field(
        default="zero", description="values of new connections; normal: as the layer's first ones were drawn"
    )
    bounds: Literal["obey", "redraw"] = Field(
        default="obey",
        description="a candidate is made inside the limits of layers, heads and neurons, or drawn again until it is",
    )
    redraws: Annotated[Count, Idle(lambda rule, _: rule.bounds != "redraw", "bounds is not redraw")] = Field(
        default=20, description="draws before a candidate that keeps leaving the limits is given up (redraw)"
    )
    proxy: Annotated[ProxyConfig, dataclasses.replace(_ALONE, but=("terms",))] = ProxyConfig()
    micro_batch: Annotated[MicroBatchConfig, _ALONE] = MicroBatchConfig()
    reset: ResetConfig = ResetConfig()
    adaptation: Annotated[AdaptationConfig, _STEADY] = AdaptationConfig()
    burn_in: BurnInConfig = BurnInConfig()

    @property
    def compares(self) -> bool:
        """Whether candidates are scored: with the current topology, or among themselves."""
        alone = self.candidates == 1 and not self.adaptation.enabled
        return self.selection == "elitist" or not alone or self.reset.happens

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        require_order(self.start, self.stop)
        for name, (low, high) in {
            "reset.reshuffle": self.reset.reshuffle,
            "adaptation.candidates": self.adaptation.candidates,
            "adaptation.mutation_rate": self.adaptation.mutation_rate,
        }.items():
            if low > high:
                raise SettingError(f"[{low:g}, {high:g}] must be given lowest first", name)
        return self

    @model_validator(mode="after")
    def _plateaus_are_of_the_cross_entropy(self) -> Self:
        if self.reset.boosted_probability and self.proxy.terms["cross_entropy"] is None:
            raise SettingError(
                "reset.boosted_probability follows the cross entropy: keep proxy.terms.cross_entropy, or set it to 0",
                "proxy.terms.cross_entropy",
                "reset.boosted_probability",
            )
        return self


@dataclass(frozen=True)
class EvolutionState:
    """The strategy's own parameters, outcomes in a row, the plateau, and the terms' statistics."""

    candidates: int
    mutation_rate: float
    successes: int = 0
    failures: int = 0
    best_cross_entropy: float | None = None
    stagnant_updates: int = 0
    boosted_left: int = 0
    running: Running = field(default_factory=Running)


@RULES.register("evolution", EvolutionConfig)
class Evolution(Rule[EvolutionState]):
    """The evolution strategy; its proposer, selection, adaptation and resets are chosen by the configuration."""

    def __init__(self, config: EvolutionConfig) -> None:
        self.config = config
        self.initialization = config.initialization
        self.burn_in = config.burn_in
        self.declines = config.selection == "elitist"
        self.shifts = "topology.proposer shift" if config.proposer == "shift" else None
        self.when = Periodic(config.every or "5%", config.start, config.stop, at_stop=True)
        needs: set[Need] = set()
        wanted: dict[str, Need] = {"guided": "gradient_at", "rigl": "dense_gradient"}
        if config.proposer in wanted:
            needs.add(wanted[config.proposer])
            self.window = Window(config.window, config.window_every)
        if config.compares:
            self.terms = config.proxy.built()
            needs = needs.union(*(term.needs for term in self.terms))
            if needs & {"loss", "candidate_gradient"}:
                needs.add("loss")
                self.micro_batch = config.micro_batch
        self.needs = frozenset(needs)

    def initial_state(self) -> EvolutionState:
        config = self.config
        if not config.adaptation.enabled:
            return EvolutionState(config.candidates, config.mutation_rate)
        return EvolutionState(
            _clamp(config.candidates, config.adaptation.candidates),
            _clamp(config.mutation_rate, config.adaptation.mutation_rate),
        )

    def state_from_dict(self, data: Mapping[str, Any]) -> EvolutionState:
        moments = {name: Moments(**of_term) for name, of_term in data["running"]["terms"].items()}
        return EvolutionState(**{**data, "running": Running(moments)})

    def sample(
        self, topologies: Mapping[str, Topology], state: EvolutionState, rng: torch.Generator
    ) -> dict[str, Tensor]:
        from sparsae.rules.parts.sampling import sample_inactive

        return sample_inactive(topologies, self.config.sample_ratio, rng) if "gradient_at" in self.needs else {}

    def growth(self, topologies: Mapping[str, Topology], state: EvolutionState, progress: float) -> dict[str, int]:
        from sparsae.rules.parts.proposers import shares

        active = sum(topology.count for topology in topologies.values())
        return shares(topologies, self._moves(active, state, progress))

    def probed_units(self, active: int, inactive: int) -> int:
        if "gradient_at" in self.needs:
            return min(round(self.config.sample_ratio * active), inactive)
        return super().probed_units(active, inactive)

    def candidates_scored(self, layers: Iterable[str], steps: range, horizon: Horizon) -> int:
        return self.initial_state().candidates

    def ask(self, observation: Observation, state: EvolutionState, rng: torch.Generator) -> list[Candidate]:
        return [self._draw(observation, state, rng) for _ in range(state.candidates)]

    def tell(
        self,
        candidates: Sequence[Candidate],
        scores: Sequence[Score | None],
        current: Score | None,
        state: EvolutionState,
        progress: float,
    ) -> tuple[Decision, EvolutionState]:
        if current is None:
            chosen = next((i for i, candidate in enumerate(candidates) if candidate.rejected is None), None)
            return Decision(chosen), state
        measured = [score for score in (current, *scores) if score is not None and is_finite(score)]
        running = state.running.including(measured)

        def rated(score: Score) -> float:
            # A term that never varied counts as 0 below, and so would one that is no number.
            if not is_finite(score):
                return math.nan
            return self.config.proxy.combined(score, self.terms, running, progress)

        now = self.config.proxy.combined(current, self.terms, running, progress)
        values = tuple(None if score is None else rated(score) for score in scores)
        # min() takes the first of equals, so of ties the lowest index is taken on every rank.
        ranked = [(value, i) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
        best = min(ranked, default=None)
        improved = best is not None and best[0] < now
        chosen = best[1] if best is not None and (improved or self.config.selection == "comma") else None
        state = dataclasses.replace(state, running=running)
        if (cross_entropy := current.get("cross_entropy")) is not None:
            state = self._after_plateau(state, cross_entropy)
        if best is not None:
            state = self._adapted(state, improved)
        return Decision(chosen, values, now), state

    def telemetry(self, state: EvolutionState, progress: float) -> dict[str, float]:
        return {
            "candidates_count": state.candidates,
            "mutation_rate": self.mutation_rate(state, progress),
            "reset_probability": self.reset_probability(state),
        }

    def without_scores(self) -> Rule[EvolutionState]:
        if "loss" not in self.needs:
            return self
        if self.config.selection != "comma":
            raise InputError(
                f"selection '{self.config.selection}' (topology.selection) compares losses: "
                "give Sparsifier a score function"
            )
        quiet: dict[str, dict[str, Any]] = {
            "adaptation": {"enabled": False},
            "reset": {"probability": 0.0, "boosted_probability": 0.0},
        }
        plain: dict[str, Any] = {**self.config.model_dump(), "candidates": 1}
        for section, values in quiet.items():
            plain[section] = {**plain[section], **values}
        rule = Evolution(EvolutionConfig.model_validate(plain))
        rule.ramp, rule.ramp_first = self.ramp, self.ramp_first
        return rule

    def mutation_rate(self, state: EvolutionState, progress: float) -> float:
        """p_mutate in force: the state's, times the schedule between start and stop."""
        span = (progress - self.config.start) / (self.config.stop - self.config.start)
        return state.mutation_rate * decayed(self.config.mutation_schedule, min(max(span, 0.0), 1.0))

    def reset_probability(self, state: EvolutionState) -> float:
        """p_reset in force: boosted for a few updates after a plateau."""
        reset = self.config.reset
        return reset.boosted_probability if state.boosted_left else reset.probability

    def _moves(self, active: int, state: EvolutionState, progress: float) -> int:
        """q, the units that a candidate moves."""
        return max(1, round(self.mutation_rate(state, progress) * active))

    def _draw(self, observation: Observation, state: EvolutionState, rng: torch.Generator) -> Candidate:
        import torch

        from sparsae.rules.parts.choose import keeps_limits, within_limits
        from sparsae.rules.parts.proposers import PROPOSERS, Guidance, reset

        config = self.config
        guidance = Guidance(config.drop_temperature, config.grow_temperature, config.random_share)
        count = self._moves(observation.count, state, observation.progress)
        is_reset = float(torch.rand((), generator=rng, dtype=torch.float32, device="cpu")) < self.reset_probability(
            state
        )

        def proposed(seen: Observation) -> tuple[str, Swap]:
            if is_reset:
                return reset(seen, self.config.reset, rng)
            return self.config.proposer, PROPOSERS[self.config.proposer](seen, count, guidance, rng)

        # N of M is what a topology is there, rather than a limit that a draw may miss: none would ever keep it.
        has_quotas = any(part.is_quota for view in observation.layers.values() for part in view.groups)
        if self.config.bounds == "obey" or has_quotas:
            name, swap = proposed(observation)
            return Candidate(within_limits(observation, swap, rng), name)
        blind = {name: dataclasses.replace(view, groups=()) for name, view in observation.layers.items()}
        for _ in range(self.config.redraws):
            name, swap = proposed(dataclasses.replace(observation, layers=blind))
            if keeps_limits(observation.layers, swap):
                return Candidate(swap, name)
        return Candidate(swap, name, rejected="bounds")

    def _after_plateau(self, state: EvolutionState, cross_entropy: float) -> EvolutionState:
        """The micro-batch perplexity of the current topology decides; perplexity is monotone in the cross entropy."""
        best = state.best_cross_entropy
        if math.isfinite(cross_entropy) and (best is None or cross_entropy < best):
            return dataclasses.replace(
                state, best_cross_entropy=cross_entropy, stagnant_updates=0, boosted_left=max(0, state.boosted_left - 1)
            )
        stagnant = state.stagnant_updates + 1
        if stagnant >= self.config.reset.patience:
            return dataclasses.replace(state, stagnant_updates=0, boosted_left=self.config.reset.boosted_updates)
        return dataclasses.replace(state, stagnant_updates=stagnant, boosted_left=max(0, state.boosted_left - 1))

    def _adapted(self, state: EvolutionState, improved: bool) -> EvolutionState:
        """Improvement `patience` times in a row shrinks lambda and p_mutate; as much stagnation grows them."""
        adaptation = self.config.adaptation
        if not adaptation.enabled:
            return state
        successes, failures = (state.successes + 1, 0) if improved else (0, state.failures + 1)
        if max(successes, failures) < adaptation.patience:
            return dataclasses.replace(state, successes=successes, failures=failures)
        step, factor = (-1, 1 / adaptation.factor) if improved else (1, adaptation.factor)
        return dataclasses.replace(
            state,
            candidates=_clamp(state.candidates + step, adaptation.candidates),
            mutation_rate=_clamp(state.mutation_rate * factor, adaptation.mutation_rate),
            successes=0,
            failures=0,
        )


def _clamp(value: Number, bounds: tuple[Number, Number]) -> Number:
    return min(max(value, bounds[0]), bounds[1])
