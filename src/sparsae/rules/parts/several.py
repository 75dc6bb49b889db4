"""Several rules in one model, each for the layers whose names match its pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from heapq import merge
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from sparsae.config.span import Horizon
from sparsae.core.cadence import Cadence, Window
from sparsae.core.observation import Observation
from sparsae.core.swap import Swap
from sparsae.errors import InputError
from sparsae.rules.parts.rule import Candidate, Decision, Rule
from sparsae.score import Score

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw

Value = TypeVar("Value")
States = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class AnyOf(Cadence):
    """Whenever one of several is due."""

    cadences: tuple[Cadence, ...]

    def due(self, step: int, horizon: Horizon) -> bool:
        return any(cadence.due(step, horizon) for cadence in self.cadences)

    def steps(self, horizon: Horizon) -> Iterator[int]:
        return (step for step, _ in groupby(merge(*(cadence.steps(horizon) for cadence in self.cadences))))


@dataclasses.dataclass(frozen=True)
class SeveralState:
    """The state of each rule, as it would be alone."""

    states: States


class Several(Rule[SeveralState]):
    """The first pattern (a glob) that matches a layer's name says which rule moves its connections.

    Each rule sees its own layers only, at its own updates. One of them may compare candidates by scores; each of its
    candidates then is of the whole model, the one proposal of the others that are due in it. Where it is not due, the
    others' is not scored.

    Raises InputError for rules that prune, that want other starting values, burn-ins or accumulations than another,
    and where two compare candidates.
    """

    def __init__(self, rules: Mapping[str, Rule[Any]]) -> None:
        self.rules = dict(rules)
        rules_ = list(self.rules.values())
        self.when = AnyOf(tuple(rule.when for rule in rules_))
        self.moves = any(rule.moves for rule in rules_)
        self.needs = frozenset().union(*(rule.needs for rule in rules_))
        self.declines = any(rule.declines for rule in rules_)
        moving = [rule for rule in rules_ if rule.moves]
        if pruning := next((rule.name for rule in rules_ if rule.prunes), None):
            raise InputError(f"rule '{pruning}' prunes, which it can do only over the whole model: leave `rules` out")
        if len(scored := [rule for rule in moving if rule.terms]) > 1:
            raise InputError(
                f"rules '{scored[0].name}' and '{scored[1].name}' both compare candidates by scores: let one of them do"
            )
        self.shifts = next((rule.shifts for rule in rules_ if rule.shifts), None)
        self.micro_batch = scored[0].micro_batch if scored else None
        self.terms = scored[0].terms if scored else ()
        dense = [rule for rule in moving if "dense_gradient" in rule.needs]
        self.accumulate = _common("accumulate", dense, lambda rule: rule.accumulate, "last")
        self.initialization = _common("initialization", moving, lambda rule: rule.initialization, "zero")
        self.burn_in = _common("burn_in", moving, lambda rule: rule.burn_in, Rule.burn_in)
        self.ramp = _common("ramp", moving, lambda rule: rule.ramp, Rule.ramp)
        self.ramp_first = _common("ramp_first", moving, lambda rule: rule.ramp_first, Rule.ramp_first)

    @property
    def name(self) -> str:
        return " + ".join(dict.fromkeys(rule.name for rule in self.rules.values()))

    def initial_state(self) -> SeveralState:
        return SeveralState(tuple(rule.initial_state() for rule in self.rules.values()))

    def state_from_dict(self, data: Mapping[str, Any]) -> SeveralState:
        pairs = zip(self.rules.values(), data["states"], strict=True)
        return SeveralState(tuple(rule.state_from_dict(state) for rule, state in pairs))

    def ramp_steps(self, horizon: Horizon) -> int:
        # One clock for all layers: what a rule has grown is spared at least until that rule's own next update.
        return max(rule.ramp_steps(horizon) for rule in self.rules.values() if rule.moves or not self.moves)

    def ramp_in_force(self, state: SeveralState, horizon: Horizon) -> int | None:
        pairs = list(zip(self.rules.values(), state.states, strict=True))
        moved = [rule.ramp_in_force(own, horizon) for rule, own in pairs]
        if all(steps is None for steps in moved):
            return None
        return max(
            rule.ramp_steps(horizon) if steps is None else steps
            for (rule, _), steps in zip(pairs, moved, strict=True)
            if rule.moves
        )

    def concerns(self, layers: Iterable[str], steps: range, horizon: Horizon) -> set[str]:
        due = self._due(steps, horizon)
        return {name for name in layers if self._index(name) in due}

    def compares(self, steps: range, horizon: Horizon) -> bool:
        rules = list(self.rules.values())
        return any(rules[i].terms for i in self._due(steps, horizon))

    def refuse_layers(self, layers: Iterable[str]) -> None:
        used = {self._index(name) for name in layers}
        if idle := [pattern for i, pattern in enumerate(self.rules) if i not in used]:
            raise InputError(f"the rule under the pattern '{idle[0]}' has no sparse layer: no name matches it first")

    def of(self, layer: str) -> Rule[Any]:
        return list(self.rules.values())[self._index(layer)]

    def sample(
        self, topologies: Mapping[str, Topology], state: SeveralState, rng: torch.Generator
    ) -> dict[str, Tensor | Draw]:
        found: dict[str, Tensor | Draw] = {}
        for rule, mine, own in self._split(topologies, state):
            if "gradient_at" in rule.needs:
                found |= rule.sample(mine, own, rng)
        return found

    def windows(self, layers: Iterable[str], state: SeveralState) -> dict[str, Window]:
        found: dict[str, Window] = {}
        for rule, mine, own in self._split(dict.fromkeys(layers), state):
            found |= rule.windows(mine, own)
        return found

    def growth(self, topologies: Mapping[str, Topology], state: SeveralState, progress: float) -> dict[str, int]:
        found: dict[str, int] = {}
        for rule, mine, own in self._split(topologies, state):
            if "dense_gradient" in rule.needs:
                found |= rule.growth(mine, own, progress)
        return found

    def candidates_scored(self, layers: Iterable[str], steps: range, horizon: Horizon) -> int:
        rules = list(self.rules.values())
        return max(
            rule.candidates_scored([name for name in layers if self._index(name) == i], steps, horizon)
            for i, rule in enumerate(rules)
            if rule.terms or not self.terms
        )

    def ask(self, observation: Observation, state: SeveralState, rng: torch.Generator) -> list[Candidate]:
        due = self._due(observation.made_up, observation.horizon)
        asked = [
            rule.ask(dataclasses.replace(observation, layers=mine), own, rng) if mine and i in due else []
            for i, (rule, mine, own) in enumerate(self._split(observation.layers, state))
        ]
        # A rule with one proposal has it in every candidate of the one that compares, but for its probes.
        width = max(map(len, asked), default=0)
        parts = [[found[i % len(found)] for found in asked if found] for i in range(width)]
        return [_merged([part for part in mine if part.is_probe] or mine) for mine in parts]

    def tell(
        self,
        candidates: Sequence[Candidate],
        scores: Sequence[Score | None],
        current: Score | None,
        state: SeveralState,
        progress: float,
    ) -> tuple[Decision, SeveralState]:
        rules = list(self.rules.values())
        judge = next((i for i, rule in enumerate(rules) if rule.terms), 0)
        if current is None or not rules[judge].terms:
            return Rule.tell(self, candidates, scores, current, state, progress)
        decision, own = rules[judge].tell(candidates, scores, current, state.states[judge], progress)
        states = (*state.states[:judge], own, *state.states[judge + 1 :])
        return decision, SeveralState(states)

    def telemetry(self, state: SeveralState, progress: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for rule, own in zip(self.rules.values(), state.states, strict=True):
            found = rule.telemetry(own, progress) | found
        return found

    def without_scores(self) -> Several:
        return Several({pattern: rule.without_scores() for pattern, rule in self.rules.items()})

    def _index(self, layer: str) -> int:
        """Which rule moves a layer's connections."""
        index = next((i for i, pattern in enumerate(self.rules) if fnmatchcase(layer, pattern)), None)
        if index is None:
            raise InputError(f"no rule is for layer {layer}: add one under the pattern '*'")
        return index

    def _due(self, steps: range, horizon: Horizon) -> set[int]:
        """Rules with an update at any of these steps."""
        return {i for i, rule in enumerate(self.rules.values()) if any(rule.due(step, horizon) for step in steps)}

    def _split(self, layers: Mapping[str, Value], state: SeveralState) -> list[tuple[Rule[Any], dict[str, Value], Any]]:
        mine: list[dict[str, Value]] = [{} for _ in self.rules]
        for name, value in layers.items():
            mine[self._index(name)][name] = value
        return list(zip(self.rules.values(), mine, state.states, strict=True))


def _common(what: str, rules: Sequence[Rule[Any]], value: Callable[[Rule[Any]], Value], otherwise: Value) -> Value:
    """What all rules have alike."""
    for rule in rules[1:]:
        if value(rule) != value(rules[0]):
            raise InputError(
                f"rules '{rules[0].name}' and '{rule.name}' differ in {what}, which several rules in one model share: "
                "set the same in both"
            )
    return value(rules[0]) if rules else otherwise


def _merged(parts: Sequence[Candidate]) -> Candidate:
    drop: dict[str, Tensor] = {}
    grow: dict[str, Tensor] = {}
    for part in parts:
        drop |= part.swap.drop
        grow |= part.swap.grow
    rejected = next((part.rejected for part in parts if part.rejected), None)
    proposer = " + ".join(dict.fromkeys(part.proposer for part in parts))
    scored = all(part.is_scored for part in parts)
    note = next((part.note for part in parts if part.note is not None), None)
    return Candidate(Swap(drop, grow), proposer, rejected, scored, any(part.is_probe for part in parts), note)
