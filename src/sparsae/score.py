"""By what topologies are compared: a list of terms, each one number of a topology; lower is better.

    P = sum over the terms of weight * x, less where higher is better

A term is one file that registers itself (`sparsae.terms`). Nothing else knows which terms there are: the search
evaluates those that a rule has, the metrics record them by name, and the report draws them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from sparsae.config.rules import TermConfig
from sparsae.core.observation import LayerView, Need
from sparsae.errors import InputError

if TYPE_CHECKING:
    from sparsae.core.topology import Topology
    from sparsae.surgery import Change

# The values of a topology's terms, by name.
Score = Mapping[str, float]
Settings = TypeVar("Settings", bound=TermConfig)


@dataclass(frozen=True, eq=False)
class Trial:
    """What is known of one topology that is being scored.

    views: the layers that train, as they are now. changes: what would become of some of them; nothing of the current
    topology. forward, backward: compute its loss and the norms of its gradients; None where no term declares the need.
    """

    views: Mapping[str, LayerView]
    changes: Mapping[str, Change] = field(default_factory=dict)
    forward: Callable[[], float] | None = None
    backward: Callable[[], Mapping[str, float]] | None = None

    @cached_property
    def topologies(self) -> dict[str, Topology]:
        """The layers' topologies as they would be."""
        return {
            name: self.changes[name].after if name in self.changes else view.topology
            for name, view in self.views.items()
        }

    @cached_property
    def loss(self) -> float:
        """Mean cross entropy on held-out text, in nats. Raises InputError unless a term needs "loss"."""
        return _declared(self.forward, "loss")()

    @cached_property
    def gradient_norms(self) -> Mapping[str, float]:
        """L2 norm of that loss's gradient at each layer's active weights: for terms that need "candidate_gradient"."""
        return _declared(self.backward, "candidate_gradient")()


class Term(ABC, Generic[Settings]):
    """One number of a topology.

    label, unit: what people call it. needs: what has to be captured for it. higher_is_better: whether its weight counts
    negatively. anneals: whether its weight fades where the weights of a score do.
    """

    label: ClassVar[str]
    unit: ClassVar[str]
    needs: frozenset[Need] = frozenset()
    higher_is_better: ClassVar[bool] = False
    anneals: ClassVar[bool] = True

    def __init__(self, config: Settings) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """What settings and metrics call it."""
        return self.config.registered_name

    @abstractmethod
    def value(self, trial: Trial) -> float:
        """The number of one topology, a function of the trial alone."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of the numbers so far (Welford, 1962)."""

    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    def including(self, x: float) -> Moments:
        """After one more number."""
        delta = x - self.mean
        mean = self.mean + delta / (self.count + 1)
        return Moments(self.count + 1, mean, self.square + delta * (x - mean))

    def standardized(self, x: float) -> float:
        """(x - mean) / deviation; 0 where the numbers never varied."""
        deviation = math.sqrt(self.square / self.count) if self.count else 0.0
        return (x - self.mean) / deviation if deviation > 1e-12 * max(1.0, abs(self.mean)) else 0.0


@dataclass(frozen=True)
class Running:
    """Each term's moments over everything that was scored, by name."""

    terms: Mapping[str, Moments] = field(default_factory=dict)

    def including(self, scores: Iterable[Score]) -> Running:
        """After more scores."""
        terms = dict(self.terms)
        for score in scores:
            for name, x in score.items():
                terms[name] = terms.get(name, Moments()).including(x)
        return Running(terms)

    def standardized(self, score: Score) -> Score:
        """Each term by its own mean and deviation; one that never varied gives 0."""
        return {name: self.terms.get(name, Moments()).standardized(x) for name, x in score.items()}


def is_finite(score: Score) -> bool:
    """Whether every term is a number."""
    return all(map(math.isfinite, score.values()))


def combine(score: Score, terms: Iterable[Term], fade: float = 1.0) -> float:
    """P of a score: its terms by their weights, times `fade` those that anneal."""
    total = 0.0
    for term in terms:
        weight = term.config.weight * (fade if term.anneals else 1.0)
        total += (-weight if term.higher_is_better else weight) * score[term.name]
    return total


Computed = TypeVar("Computed")


def _declared(computed: Callable[[], Computed] | None, need: str) -> Callable[[], Computed]:
    if computed is None:
        raise InputError(f"a term of the score reads what it does not declare: add '{need}' to its needs")
    return computed
