"""What a topology rule is.

A rule is hyper-parameters with pure functions over an explicit state and an explicit generator. The loop asks whether
an update is due, captures just what the rule needs, asks for candidates, has them scored if the rule needs scores,
and tells the rule the scores; the rule answers with its choice. SET, RigL and their like are rules with one
candidate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from sparsae.config.topology import BurnInConfig, MicroBatchConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.topology import Topology
from sparsae.kernels.probe import Draw
from sparsae.surgery import Swap

Need = Literal["gradient", "gradient_at", "dense_gradient", "moments", "micro_batch_score", "candidate_gradient"]
State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class LayerView:
    """One sparse layer at the moment of an update.

    values, gradient (of the last backward pass) and moment (the optimizer's average gradient) have the topology's
    values_shape; sample holds inactive units and sample_gradient the gradients there. Under "dense_gradient" these are
    the units with the largest gradients, and sample_gradient (n,) and active_gradient (count,) are magnitudes, of the
    same backward passes. bounds are (k_min, k_max) in units, head_floor the least active units of a head, ends the
    layer's units at the start and by its budget at the end of a run that prunes. What the rule did not declare is None.
    """

    topology: Topology
    values: Tensor
    bounds: tuple[int, int]
    heads: HeadLayout | None = None
    head_floor: int = 0
    gradient: Tensor | None = None
    moment: Tensor | None = None
    sample: Tensor | None = None
    sample_gradient: Tensor | None = None
    active_gradient: Tensor | None = None
    ends: tuple[int, int] | None = None

    @property
    def magnitude(self) -> Tensor:
        """(count,) |w| of each unit, the L2 norm of a block."""
        return unit_magnitude(self.values)

    def holds(self, count: int) -> bool:
        """Whether so many active units are inside this layer's bounds."""
        return self.bounds[0] <= count <= self.bounds[1]

    def keeps_floor(self, topology: Topology) -> bool:
        """Whether a new topology of this layer leaves every attention head its floor."""
        if self.heads is None or not self.head_floor:
            return True
        return int(head_counts(topology, self.heads).min()) >= self.head_floor


@dataclass(frozen=True, eq=False)
class Observation:
    """The model's sparse layers at an update, which follows step `step`, counted from 1, of `steps`."""

    layers: Mapping[str, LayerView]
    step: int
    steps: int

    @property
    def progress(self) -> float:
        """Share of the run that has passed."""
        return self.step / self.steps

    @property
    def topologies(self) -> dict[str, Topology]:
        """The layers' topologies."""
        return {name: view.topology for name, view in self.layers.items()}

    @property
    def count(self) -> int:
        """Active units of the whole model."""
        return sum(view.topology.count for view in self.layers.values())


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposal: which proposer made it, and why it is out of the race (None: it is in)."""

    swap: Swap
    proposer: str
    rejected: str | None = None


@dataclass(frozen=True)
class NoState:
    """Nothing to remember."""


@dataclass(frozen=True)
class Score:
    """The raw components of the proxy, for one topology: nats, a density, and a gradient norm."""

    cross_entropy: float
    diversity: float
    activity: float

    @property
    def is_finite(self) -> bool:
        """Whether every component is a number."""
        return math.isfinite(self.cross_entropy) and math.isfinite(self.diversity) and math.isfinite(self.activity)


@dataclass(frozen=True)
class Decision:
    """The rule's choice (an index, None: stay), and the proxy's value of each candidate and of the current topology."""

    chosen: int | None
    scores: tuple[float | None, ...] = ()
    current: float | None = None


class Rule(ABC, Generic[State]):
    """A topology rule. `State` is a frozen dataclass of plain numbers, so that checkpoints are JSON.

    moves: whether it ever changes the topology. needs: what has to be captured for it. accumulate: over which backward
    passes of a step a "dense_gradient" is taken. prunes: whether the model shrinks. micro_batch: the held-out sequences
    that score its candidates, where it needs scores. initialization: values of grown units (see `surgery.plan`).
    burn_in: the gradient steps after a change.
    """

    moves: bool = True
    needs: frozenset[Need] = frozenset()
    accumulate: Literal["last", "sum"] = "last"
    prunes: bool = False
    initialization: str = "zero"
    burn_in: BurnInConfig = BurnInConfig(steps=0)
    micro_batch: MicroBatchConfig | None = None

    @abstractmethod
    def initial_state(self) -> State:
        """The state before the first update."""

    def state_from_dict(self, data: Mapping[str, Any]) -> State:
        """The state that `dataclasses.asdict` turned into `data`, JSON in between."""
        return type(self.initial_state())(**data)

    @abstractmethod
    def due(self, step: int, steps: int) -> bool:
        """Whether an update follows optimizer step `step`, counted from 1, of `steps`."""

    def sample(
        self, topologies: Mapping[str, Topology], state: State, rng: torch.Generator
    ) -> Mapping[str, Tensor | Draw]:
        """The inactive units whose gradients the next update wants, by layer ("gradient_at")."""
        return {}

    def growth(self, topologies: Mapping[str, Topology], state: State, progress: float) -> Mapping[str, int]:
        """At most so many units will each layer grow at the update that comes next ("dense_gradient")."""
        return {}

    def probed_units(self, active: int, inactive: int) -> int:
        """Of how many inactive units of a layer an update computes the gradient, at most: for plans."""
        return inactive if "dense_gradient" in self.needs else 0

    def active_units(self, start: int, end: int, step: int, steps: int) -> int:
        """Active units of a model after `step`, of one that starts with `start` and has `end` by its settings."""
        return start

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
        return Decision(next((i for i, c in enumerate(candidates) if c.rejected is None and c.swap.size), None)), state

    @abstractmethod
    def telemetry(self, state: State, progress: float) -> dict[str, float]:
        """The strategy parameters that are in force, for the metrics."""

    def without_scores(self) -> Rule[State]:
        """This rule where nothing can score a candidate. Raises InputError where it cannot do without."""
        return self


def unit_magnitude(tensor: Tensor) -> Tensor:
    """(count,) magnitude of each unit: |w|, or the L2 norm of a block."""
    return tensor.abs() if tensor.dim() == 1 else tensor.flatten(1).norm(dim=1)


def head_counts(topology: Topology, heads: HeadLayout) -> Tensor:
    """(heads,) active units of each attention head's slice of a layer."""
    side = topology.rows if heads.axis == "out" else topology.columns
    block = topology.unit[0] if heads.axis == "out" else topology.unit[1]
    return torch.bincount((side.long() * block) // heads.size, minlength=heads.groups(*topology.shape))


def head_densities(topology: Topology, heads: HeadLayout) -> Tensor:
    """(heads,) density of each head's slice."""
    counts = head_counts(topology, heads)
    return counts.double() * counts.numel() / topology.units
