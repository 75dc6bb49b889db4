"""What a topology rule is.

A rule is hyper-parameters with pure functions over an explicit state and an explicit generator. The loop asks whether
an update is due, captures just what the rule needs, asks for candidates, has them scored if the rule needs scores,
and tells the rule the scores; the rule answers with its choice. SET, RigL and their like are rules with one
candidate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from sparsae.config.rules import BurnInConfig, MicroBatchConfig
from sparsae.config.span import Horizon, in_updates, span_steps
from sparsae.core.budgets import shrunk
from sparsae.core.cadence import LAST_STEP, Cadence, Never, Window
from sparsae.core.observation import Need, Observation
from sparsae.core.swap import Swap
from sparsae.score import Score, Term

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw

State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposal: which proposer made it, and why it is out of the race (None: it is in).

    is_scored: whether it is scored where the rule's terms are. is_probe: it is scored to learn from, and never chosen.
    note: what `ask` leaves for `tell`.
    """

    swap: Swap
    proposer: str
    rejected: str | None = None
    is_scored: bool = True
    is_probe: bool = False
    note: Any = None


@dataclass(frozen=True)
class NoState:
    """Nothing to remember."""


@dataclass(frozen=True)
class Decision:
    """The rule's choice (an index, None: stay), and the combined score of each candidate and of the current one.

    notes: what else the metrics shall have of this update.
    """

    chosen: int | None
    scores: tuple[float | None, ...] = ()
    current: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


class Rule(ABC, Generic[State]):
    """A topology rule: `when` its updates happen, and what `ask` proposes.

    `State` is a frozen dataclass of plain numbers, so that checkpoints are JSON. moves: whether it ever changes the
    topology. needs: what has to be captured for it, and for its terms. window: the steps that gradients at inactive
    units are averaged over. terms: what its candidates and the current topology are scored by; none: they are not.
    accumulate: over which backward passes of a step a "dense_gradient" is taken. prunes: whether the model shrinks, as
    fast as `when` says. micro_batch: the held-out sequences that score its candidates, where it needs their loss.
    initialization: values of grown units (`surgery.prepare_swap`). burn_in: the gradient steps after a change. ramp,
    ramp_first: as its settings have them. declines: whether an update may leave the topology as it is since no
    candidate is better. shifts: the setting by which it moves density between layers on purpose, or None.
    """

    when: Cadence = Never()
    moves: bool = True
    needs: frozenset[Need] = frozenset()
    window: Window = LAST_STEP
    terms: Sequence[Term[Any]] = ()
    accumulate: Literal["last", "sum"] = "last"
    prunes: bool = False
    initialization: str = "zero"
    burn_in: BurnInConfig = BurnInConfig(steps=0)
    ramp: int | str = 0
    ramp_first: bool = False
    micro_batch: MicroBatchConfig | None = None
    declines: bool = False
    shifts: str | None = None

    @property
    def grows(self) -> bool:
        """Whether it ever grows a connection."""
        return self.moves

    @property
    def name(self) -> str:
        """What messages and metrics call it."""
        return type(self).__name__.lower()

    def initial_state(self) -> State:
        """The state before the first update: nothing, of a rule that remembers nothing."""
        return NoState()  # type: ignore[return-value]

    def state_from_dict(self, data: Mapping[str, Any]) -> State:
        """The state that `dataclasses.asdict` turned into `data`, JSON in between: equal to what it was.

        JSON has lists for tuples and text for the keys of mappings: a rule whose state has one makes it anew here.
        """
        return type(self.initial_state())(**data)

    def due(self, step: int, horizon: Horizon) -> bool:
        """Whether an update follows optimizer step `step`, counted from 1."""
        return self.when.due(step, horizon)

    def updates(self, horizon: Horizon) -> Iterator[int]:
        """The steps of a run that an update follows, in order."""
        return self.when.steps(horizon)

    def ramp_steps(self, horizon: Horizon) -> int:
        """Over how many steps a grown connection's learning rate rises; 0: it is the whole rate at once."""
        updates = in_updates(self.ramp)
        if updates is None:
            return span_steps(self.ramp, horizon) if self.ramp else 0
        return updates * self.when.interval(horizon)

    def ramp_in_force(self, state: State, horizon: Horizon) -> int | None:
        """`ramp_steps` of a rule that moves it, as the state has it; None: it stays."""
        return None

    def concerns(self, layers: Iterable[str], steps: range, horizon: Horizon) -> set[str]:
        """Names of the layers whose connections an update may move, which is that of the steps `steps`.

        That is one step, or those that it has waited through since it was due.
        """
        return set(layers)

    def compares(self, steps: range, horizon: Horizon) -> bool:
        """Whether the candidates of the update of `steps`, as `concerns` has them, are scored by the terms."""
        return bool(self.terms)

    def refuse_layers(self, layers: Iterable[str]) -> None:
        """Before a training, with the names of its sparse layers. Raises InputError where it cannot serve them."""

    def sample(
        self, topologies: Mapping[str, Topology], state: State, rng: torch.Generator
    ) -> Mapping[str, Tensor | Draw]:
        """The inactive units whose gradients the next update wants, by layer ("gradient_at").

        They are asked for at the first step of the window, and stay until its update.
        """
        return {}

    def windows(self, layers: Iterable[str], state: State) -> dict[str, Window]:
        """The steps that each layer's gradients are averaged over for the next update."""
        return dict.fromkeys(layers, self.window)

    def of(self, layer: str) -> Rule[Any]:
        """The rule that moves a layer's connections: itself, or one of those that it is made of."""
        return self

    def growth(self, topologies: Mapping[str, Topology], state: State, progress: float) -> Mapping[str, int]:
        """At most so many units will each layer grow at the next update ("dense_gradient")."""
        return {}

    def probed_units(self, active: int, inactive: int) -> int:
        """Of how many inactive units of a layer an update computes the gradient, at most: for the forecast."""
        return inactive if "dense_gradient" in self.needs else 0

    def candidates_scored(self, layers: Iterable[str], steps: range, horizon: Horizon) -> int:
        """How many candidates an update scores beside the current topology, at most, as the state begins.

        layers, steps, horizon: as `concerns` has them, of an update that compares.
        """
        return 1

    def active_units(self, start: int, end: int, step: int, horizon: Horizon) -> int:
        """Active units of a model after `step`, of one that starts with `start` and has `end` by its settings."""
        return shrunk(start, end, self.when.left(step, horizon)) if self.prunes else start

    @abstractmethod
    def ask(self, observation: Observation, state: State, rng: torch.Generator) -> list[Candidate]:
        """The candidates of an update."""

    def tell(
        self,
        candidates: Sequence[Candidate],
        scores: Sequence[Score | None],
        current: Score | None,
        state: State,
        progress: float,
    ) -> tuple[Decision, State]:
        """The choice and the next state: the first candidate that is in the race and changes anything.

        A score is None where none was needed or the candidate is rejected.
        """
        able = (i for i, c in enumerate(candidates) if c.rejected is None and not c.swap.is_empty and not c.is_probe)
        return Decision(next(able, None)), state

    def telemetry(self, state: State, progress: float) -> dict[str, float]:
        """The strategy parameters that are in force, for the metrics."""
        return {}

    def without_scores(self) -> Rule[State]:
        """This rule where nothing can score a candidate. Raises InputError where it cannot do without."""
        return self
