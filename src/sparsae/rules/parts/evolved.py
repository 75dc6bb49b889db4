"""A rule whose own numbers evolve (`strategy.py`): which settings are genes, and what a genome makes of an update."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sparsae.config.complaints import SettingError, below, within
from sparsae.config.density import DEPTH, patterns_of
from sparsae.config.rules import MicroBatchConfig, RuleConfig
from sparsae.config.span import Horizon, in_updates
from sparsae.core.budgets import density_factors
from sparsae.core.cadence import LAST_STEP, Window
from sparsae.core.observation import Observation
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.errors import InputError
from sparsae.registry import TERMS
from sparsae.rules.parts.damage import damage_factors, damage_probes
from sparsae.rules.parts.exchange import Exchange
from sparsae.rules.parts.rule import Candidate, Decision, NoState, Rule
from sparsae.rules.parts.shift import shifted
from sparsae.rules.parts.strategy import GENE, Gene, Strategy, StrategyConfig, StrategyState
from sparsae.score import Score

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw

# Genes that are no setting of a rule: updates between changes, and over how many updates a grown connection ramps up.
INTERVAL, RAMP = "interval", "ramp"
_DENSITY = "density."
_FIXED = ("every", "stop")  # these say when updates happen, which the forecast and the loop have to know beforehand


@dataclass(frozen=True)
class EvolvedState:
    """strategy: of the genome. idle: updates since the last change.

    counts: units of each layer at the first update, where densities move. damage: their factors by measured damage.
    """

    strategy: StrategyState
    idle: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    damage: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """What `ask` leaves for `tell`: a seed for draws, whether it was time for a change, the layers' first counts.

    probes: the layer of each candidate that is to be learnt from, and how many of its units are left out.
    """

    seed: int
    moved: bool
    counts: Mapping[str, int]
    probes: tuple[tuple[str, int], ...] = ()


def genes_of(config: StrategyConfig, settings: RuleConfig) -> tuple[Gene, ...]:
    """The genes of a rule with these settings. Raises ValueError for a range that is none of a number of the rule."""
    fields, found = type(settings).model_fields, []
    for name, ends in config.genes.items():
        value = getattr(settings, name, None)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in (INTERVAL, RAMP) and (name not in fields or not is_number or name in _FIXED):
            raise SettingError(
                f"{name} is no number of rule {settings.rule} that can evolve, nor {INTERVAL} or {RAMP}",
                f"strategy.genes.{name}",
            )
        whole = name == INTERVAL or (name != RAMP and isinstance(value, int))
        if whole and math.ceil(ends[0]) > math.floor(ends[1]):
            what = f"no whole number lies between {ends[0]:g} and {ends[1]:g}"
            raise SettingError(what, f"strategy.genes.{name}")
        found.append(Gene(name, *ends, whole=whole))
        if name not in (INTERVAL, RAMP):
            for end in ends:
                try:
                    _with(settings, {name: found[-1].value(found[-1].place(end))})
                except ValidationError as errors:
                    told = below("strategy.genes", within(errors))
                    raise SettingError(told.what, f"strategy.genes.{name}") from None
    if RAMP in config.genes and config.genes[RAMP][0] == 0:
        raise SettingError("must be above 0 updates", "strategy.genes.ramp")
    return (*found, *(Gene(f"{_DENSITY}{key}", *ends) for key, ends in config.density.items()))


class Evolved(Rule[EvolvedState]):
    """A rule that exchanges connections, with numbers in the place of some of its settings that evolve during the run.

    An update measures the loss of the current topology on held-out text. Where the genome has an interval, only every
    so many updates change anything. Where it has densities, layers move from their first counts towards these times
    their factors (`shift.py`).
    """

    def __init__(self, settings: RuleConfig, config: StrategyConfig, build: Callable[[Any], Exchange]) -> None:
        """build: the rule of such settings, which the genome fills in."""
        self._settings, self._config, self._build = settings, config, build
        genes = genes_of(config, settings) if config.fitness != "none" else ()
        self._numbers = [gene.name for gene in genes if gene.name in type(settings).model_fields and gene.name != RAMP]
        # The first interval is the middle of its range, a gene that is no number of the rule 1.
        middle = math.prod(config.genes.get(INTERVAL, (1.0, 1.0))) ** 0.5
        own = {INTERVAL: middle, RAMP: float(in_updates(settings.ramp) or 1)}
        own |= {name: getattr(settings, name) for name in self._numbers}
        first = tuple(gene.place(own.get(gene.name, 1.0)) for gene in genes)
        self.strategy = Strategy(genes, first, config)
        inner = self._inner(self.strategy.begin())
        ends = [(gene.name, gene.value(end)) for gene in genes if gene.name in self._numbers for end in (0.0, 1.0)]
        self._extremes = [inner, *(build(_with(settings, {name: value})) for name, value in ends)]
        self.when, self.accumulate, self.initialization = inner.when, inner.accumulate, inner.initialization
        self.needs = frozenset[Any]({"loss"}).union(*(rule.needs for rule in self._extremes))
        self.shifts = "topology.strategy" if config.shifts else None
        self.terms = (TERMS["cross_entropy"].build(TERMS["cross_entropy"].settings()),)
        self.micro_batch = MicroBatchConfig(mode="static", sequences=config.sequences)

    @property
    def name(self) -> str:
        return self._settings.rule

    def initial_state(self) -> EvolvedState:
        return EvolvedState(self.strategy.begin())

    def state_from_dict(self, data: Mapping[str, Any]) -> EvolvedState:
        # Not all keep a mapping that is empty (torch's distributed checkpoints do not).
        counts, damage = dict(data.get("counts", {})), dict(data.get("damage", {}))
        return EvolvedState(StrategyState.from_dict(data["strategy"]), data["idle"], counts, damage)

    def refuse_layers(self, layers: Iterable[str]) -> None:
        for key in self._config.density:
            density_factors(_by_names(key, 1.0, list(layers)) or {key: 1.0}, list(layers), "topology.strategy.density")

    def compares(self, steps: range, horizon: Horizon) -> bool:
        return self._config.fitness != "none" or self._looks(steps, horizon)

    def ramp_in_force(self, state: EvolvedState, horizon: Horizon) -> int | None:
        updates = self.strategy.values(state.strategy).get(RAMP)
        return None if updates is None else max(1, round(updates * self.when.interval(horizon)))

    def sample(
        self, topologies: Mapping[str, Topology], state: EvolvedState, rng: torch.Generator
    ) -> Mapping[str, Tensor | Draw]:
        return self._inner(state.strategy).sample(topologies, NoState(), rng) if self._moves(state) else {}

    def windows(self, layers: Iterable[str], state: EvolvedState) -> dict[str, Window]:
        inner = self._inner(state.strategy)
        # A genome that looks at no gradient has a window all the same: another one's, on which the forecast counts.
        rules = (inner,) if inner.needs & {"gradient_at", "dense_gradient"} else (inner, *self._extremes)
        return dict.fromkeys(layers, next((rule.window for rule in rules if rule.window != LAST_STEP), LAST_STEP))

    def growth(self, topologies: Mapping[str, Topology], state: EvolvedState, progress: float) -> dict[str, int]:
        return self._inner(state.strategy).growth(topologies, NoState(), progress) if self._moves(state) else {}

    def probed_units(self, active: int, inactive: int) -> int:
        return max(rule.probed_units(active, inactive) for rule in self._extremes)

    def candidates_scored(self, layers: Iterable[str], steps: range, horizon: Horizon) -> int:
        return len(list(layers)) if self._looks(steps, horizon) else 0

    def ask(self, observation: Observation, state: EvolvedState, rng: torch.Generator) -> list[Candidate]:
        import torch

        seed = int(torch.randint(2**62, (), generator=rng, device="cpu"))
        moves, counts, views = self._moves(state), state.counts, observation.layers
        swap = Swap({}, {})
        if moves:
            swap = self._inner(state.strategy).ask(observation, NoState(), rng)[0].swap
        if self._config.shifts:
            counts = dict(counts) | {name: v.topology.count for name, v in views.items() if name not in counts}
            swap = shifted(views, swap, self._wanted(state, counts, list(views)), rng)
        probes = []
        if self._looks(observation.made_up, observation.horizon):
            probes = damage_probes(views, self._config.damage.share, rng)
        note = Note(seed, moves, counts, tuple((layer, probe.swap.size) for layer, probe in probes))
        return [Candidate(swap, self.name, is_scored=False, note=note), *(probe for _, probe in probes)]

    def tell(
        self,
        candidates: Sequence[Candidate],
        scores: Sequence[Score | None],
        current: Score | None,
        state: EvolvedState,
        progress: float,
    ) -> tuple[Decision, EvolvedState]:
        decision, _ = super().tell(candidates, scores, current, state, progress)
        note: Note = candidates[0].note
        state = dataclasses.replace(state, idle=0 if note.moved else state.idle + 1, counts=note.counts)
        if current is None:
            return decision, state
        loss, before = current[self.terms[0].name], state.strategy.loss
        losses = {
            layer: (score[self.terms[0].name] - loss) / size
            for (layer, size), score in zip(note.probes, scores[1:], strict=False)
            if score is not None and size
        }
        strategy = self.strategy.after(state.strategy, loss, generator(note.seed, "genome"))
        damage = self._after_damage(state.damage, losses, generator(note.seed, "damage"))
        told = {} if before is None else {"progress": before - loss, "fitness": strategy.fitness[-1]}
        return dataclasses.replace(decision, notes=told), dataclasses.replace(state, strategy=strategy, damage=damage)

    def telemetry(self, state: EvolvedState, progress: float) -> dict[str, float]:
        genome = {f"{GENE}{name}": value for name, value in self.strategy.values(state.strategy).items()}
        return self._inner(state.strategy).telemetry(NoState(), progress) | genome

    def without_scores(self) -> Rule[EvolvedState]:
        raise InputError(
            "strategy (topology.strategy) measures losses on held-out text: give Sparsifier a score function"
        )

    def _inner(self, state: StrategyState) -> Exchange:
        """The rule with the numbers of the genome in force."""
        values = self.strategy.values(state)
        return self._build(_with(self._settings, {name: values[name] for name in self._numbers}))

    def _moves(self, state: EvolvedState) -> bool:
        """Whether the next update changes anything."""
        return state.idle + 1 >= self.strategy.values(state.strategy).get(INTERVAL, 1.0)

    def _looks(self, steps: range, horizon: Horizon) -> bool:
        """Whether the update of these steps looks for where dropping is cheap."""
        every = self._config.damage.every
        return every > 0 and (steps[0] // self.when.interval(horizon)) % every == 0

    def _wanted(self, state: EvolvedState, counts: Mapping[str, int], layers: Sequence[str]) -> dict[str, float]:
        """How many units each layer shall have, up to a common factor."""
        wanted = {name: max(1, counts[name]) * state.damage.get(name, 1.0) for name in layers}
        for name, value in self.strategy.values(state.strategy).items():
            if name.startswith(_DENSITY):
                key = name.removeprefix(_DENSITY)
                factors = density_factors(_by_names(key, value, layers), layers)
                wanted = {layer: wanted[layer] * factors[layer] for layer in layers}
        return wanted

    def _after_damage(
        self, factors: Mapping[str, float], losses: Mapping[str, float], rng: torch.Generator
    ) -> Mapping[str, float]:
        """The layers' factors after the losses that a unit left out costs each were seen, in any order (shuffled)."""
        import torch

        order, known = list(losses), list(losses)
        if self._config.fitness == "shuffled":
            known = [order[i] for i in torch.randperm(len(order), generator=rng, device="cpu").tolist()]
        measured = dict(zip(order, (losses[name] for name in known), strict=True))
        return dict(factors) | damage_factors(factors, measured, self._config.damage)


def _with(settings: RuleConfig, values: Mapping[str, float]) -> RuleConfig:
    """Settings with other numbers, which do not evolve. Raises ValueError for one that the rule cannot have."""
    return type(settings).model_validate({**settings.model_dump(exclude={"strategy"}), **values})


def _by_names(key: str, value: float, layers: Sequence[str]) -> dict[str, float | list[float]]:
    """A gene's factor as those of a density: of nothing where it concerns none of the layers."""
    if key == DEPTH:
        has_blocks = any(part.isdecimal() for name in layers for part in name.split("."))
        return {DEPTH: [value, 1.0 / value]} if has_blocks else {}
    return {pattern: value for pattern in patterns_of(key) if fnmatch.filter(layers, pattern)}
