"""Strategy evolution: a few numbers of a rule, its genome, mutate between updates and are judged by progress.

Genomes live in the unit cube, a gene at 0 being at the low end of its range and at 1 at the high end; in between its
logarithm is linear (it itself where the range begins at 0). At update i, after the loss L_i of the topology in force on
held-out text, always the same tokens:

    p_i = L_(i-1) - L_i                                                    progress since the last update, in nats
    z_i = (p_i - m) / s, within [-3, 3]                                    fitness: m, s run over recent progress

A *trial* is a genome that is in force for `trial` updates. Its credit is the mean fitness of those and of `reach` more
after them: what a large drop costs is seen at once, what it brings only later, so that one generation's progress would
prefer to do little. Once two trials have their credits, the next genome is

    x = mean of the better half of the last `memory` trials + mutation * N(0, 1), reflected at the ends of the ranges

which is a (mu/mu, lambda) evolution strategy in a steady state (Beyer & Schwefel, 2002). Before, the mean is the genome
that the rule's own settings are. The placebo hands the credits to other trials than those that earned them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.effect import Idle
from sparsae.config.section import Count, Positive, Section
from sparsae.rules.parts.damage import DamageConfig

if TYPE_CHECKING:
    import torch

GENE = "gene."  # before its name, among the numbers of an update
_LARGEST_FITNESS = 3.0
_RECENT = 2  # times a trial and its reach: with a shorter running mean trials would be held against themselves


def _validated_range(ends: Any) -> Any:
    numbers = ends if isinstance(ends, list | tuple) else ()
    plain = [end for end in numbers if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(plain) != 2 or len(numbers) != 2 or not 0 <= plain[0] < plain[1] < math.inf:
        raise ValueError(f"must be the least and the most of a number, such as [0.1, 0.5], not {ends!r}")
    return ends


Range = Annotated[tuple[float, float], Field(strict=False), BeforeValidator(_validated_range)]


class StrategyConfig(Section):
    """How a rule's own numbers evolve."""

    fitness: Literal["none", "progress", "shuffled"] = Field(
        default="none",
        description="what genomes are judged by: progress on held-out text, or that of others (shuffled, the placebo); "
        "none: the rule's numbers stay",
    )
    genes: dict[str, Range] = Field(
        default={"drop_fraction": (0.1, 0.5), "interval": (1.0, 4.0)},
        description="ranges of what evolves: numbers of the rule, interval (updates from change to change) "
        "and ramp (in updates)",
    )
    density: dict[str, Range] = Field(
        default={},
        description="ranges of factors on first densities, by role, pattern or depth (the first block's; the last has "
        "its inverse)",
    )
    trial: Count = Field(default=6, description="updates for which a genome is in force")
    reach: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=2, description="later updates whose progress is credited to it too"
    )
    memory: Annotated[int, Field(ge=2, le=1000)] = Field(
        default=8, description="trials of which the better half makes the next genome"
    )
    mutation: Positive = Field(default=0.2, description="deviation of a mutation in terms of a gene's range")
    sequences: Annotated[
        int, Field(ge=1, le=64), Idle(lambda strategy, _: not strategy.is_on, "strategy.fitness is none")
    ] = Field(default=32, description="held-out sequences that progress is measured on, the same ones all the run")

    damage: Annotated[
        DamageConfig, Idle(lambda strategy, _: strategy.damage.every == 0, "damage.every is 0", but=("every",))
    ] = DamageConfig()

    @property
    def is_on(self) -> bool:
        """Whether anything evolves or is measured."""
        return self.fitness != "none" or self.damage.every > 0

    @property
    def shifts(self) -> bool:
        """Whether density moves between layers."""
        return bool(self.density and self.fitness != "none") or self.damage.every > 0

    @model_validator(mode="after")
    def _has_genes(self) -> Self:
        if self.fitness != "none" and not (self.genes or self.density):
            raise SettingError("genes and density are both empty: nothing could evolve", "genes", "density")
        for key, (low, _) in self.density.items():
            if low == 0:
                raise SettingError("a factor must be above 0", f"density.{key}")
        if (longest := self.genes.get("interval", (1.0, 1.0)))[0] < 1:
            raise SettingError("must be at least 1 update", "genes.interval")
        if self.fitness != "none" and 2 * longest[1] > self.trial + self.reach:
            raise SettingError(
                f"trial {self.trial} and reach {self.reach} must hold at least two changes that are "
                f"{longest[1]:g} updates apart (genes.interval)",
                "genes.interval",
                "trial",
                "reach",
            )
        return self


@dataclass(frozen=True)
class Gene:
    """A number that evolves, and where. whole: it is rounded."""

    name: str
    low: float
    high: float
    whole: bool = False

    def value(self, x: float) -> float:
        """The number at x in [0, 1]."""
        span = self.high - self.low
        found = self.low * (self.high / self.low) ** x if self.low > 0 else self.low + x * span
        found = min(max(found, self.low), self.high)
        return min(max(math.floor(found + 0.5), math.ceil(self.low)), math.floor(self.high)) if self.whole else found

    def place(self, value: float) -> float:
        """Where a number is in [0, 1], or the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.low > 0:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Trial:
    """A genome and the credit that it was given."""

    genome: tuple[float, ...]
    credit: float


@dataclass(frozen=True)
class StrategyState:
    """The genome in force, how many losses were told, and what is known of earlier genomes.

    loss: the last one told. mean, variance: of recent progress. fitness: of the last updates, the latest last.
    waiting: genomes without their credit, the one in force last. trials: those with theirs, the latest last.
    """

    genome: tuple[float, ...]
    told: int = 0
    loss: float | None = None
    mean: float = 0.0
    variance: float = 0.0
    fitness: tuple[float, ...] = ()
    waiting: tuple[tuple[float, ...], ...] = ()
    trials: tuple[Trial, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StrategyState:
        """From `dataclasses.asdict`, JSON in between."""
        trials = tuple(Trial(tuple(trial["genome"]), trial["credit"]) for trial in data["trials"])
        waiting = tuple(map(tuple, data["waiting"]))
        return cls(
            **{
                **data,
                "genome": tuple(data["genome"]),
                "fitness": tuple(data["fitness"]),
                "waiting": waiting,
                "trials": trials,
            }
        )


@dataclass(frozen=True)
class Strategy:
    """The evolution of a genome, as pure functions of its state. first: the genome that a run begins with."""

    genes: tuple[Gene, ...]
    first: tuple[float, ...]
    config: StrategyConfig

    def begin(self) -> StrategyState:
        """Before the first update."""
        return StrategyState(self.first, waiting=(self.first,))

    def values(self, state: StrategyState) -> dict[str, float]:
        """The genome in force, by the genes' names."""
        return {gene.name: gene.value(x) for gene, x in zip(self.genes, state.genome, strict=True)}

    def after(self, state: StrategyState, loss: float, rng: torch.Generator) -> StrategyState:
        """After the held-out loss at an update, before which the genome was in force; a new trial may begin.

        A loss that is not finite tells nothing: the progress since the last one counts as usual.
        """
        state = dataclasses.replace(self._judged(state, loss), told=state.told + 1)
        credited = len(state.fitness) == self._span and (state.told - 1 - self._span) % self.config.trial == 0
        if credited:
            state = self._credited(state, rng)
        if state.told % self.config.trial == 0:
            genome = self._mutated(self.parent(state), rng)
            state = dataclasses.replace(state, genome=genome, waiting=(*state.waiting, genome))
        return state

    def parent(self, state: StrategyState) -> tuple[float, ...]:
        """The mean of the better half of the trials that are remembered; of equal ones the earlier is better."""
        if len(state.trials) < 2:
            return self.first
        best = sorted(state.trials, key=lambda trial: -trial.credit)[: (len(state.trials) + 1) // 2]
        return tuple(math.fsum(xs) / len(best) for xs in zip(*(trial.genome for trial in best), strict=True))

    @property
    def _span(self) -> int:
        """Updates whose progress is credited to a trial."""
        return self.config.trial + self.config.reach

    def _judged(self, state: StrategyState, loss: float) -> StrategyState:
        """The state with the fitness of the steps since the update before, if there was one."""
        fitness, mean, variance, last = 0.0, state.mean, state.variance, state.loss
        if last is not None and math.isfinite(loss):
            progress, weight = last - loss, 1.0 / min(state.told, _RECENT * self._span)
            difference = progress - mean
            if state.told > 1:
                variance += weight * (difference * difference - variance)
                fitness = difference / math.sqrt(variance) if variance > 0 else 0.0
                fitness = min(max(fitness, -_LARGEST_FITNESS), _LARGEST_FITNESS)
            mean += weight * difference
        recent = (*state.fitness, fitness)[-self._span :] if state.told else ()
        known = loss if math.isfinite(loss) else last
        return dataclasses.replace(state, loss=known, mean=mean, variance=variance, fitness=recent)

    def _credited(self, state: StrategyState, rng: torch.Generator) -> StrategyState:
        """The state in which the trial that waits longest has its credit, or that of another."""
        import torch

        trial = Trial(state.waiting[0], math.fsum(state.fitness) / self._span)
        trials = (*state.trials, trial)[-self.config.memory :]
        if self.config.fitness == "shuffled":
            order = torch.randperm(len(trials), generator=rng, device="cpu").tolist()
            credits = [trials[i].credit for i in order]
            trials = tuple(Trial(trial.genome, credit) for trial, credit in zip(trials, credits, strict=True))
        return dataclasses.replace(state, waiting=state.waiting[1:], trials=trials)

    def _mutated(self, genome: Sequence[float], rng: torch.Generator) -> tuple[float, ...]:
        import torch

        noise = torch.randn(len(genome), generator=rng, dtype=torch.float64, device="cpu").tolist()
        return tuple(_reflected(x + self.config.mutation * step) for x, step in zip(genome, noise, strict=True))


def _reflected(x: float) -> float:
    """x in [0, 1], thrown back at the ends."""
    x = math.fmod(abs(x), 2.0)
    return 2.0 - x if x > 1.0 else x
