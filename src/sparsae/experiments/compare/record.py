"""What results.json of a comparison holds; docs/comparison.md explains it. Needs no torch.

What has a default was not written by earlier versions; see `earlier` for what is to be computed from what they wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sparsae.core.intervals import Interval
from sparsae.core.record import left_out_field
from sparsae.experiments.record import Planned
from sparsae.experiments.statistics import Verdict
from sparsae.tasks.record import MethodScores, TaskScores

Loss = Literal["test_loss", "validation_loss"]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A validation of a run, and what the run had spent by then; no seconds of one that trained with others."""

    step: int
    tokens: int
    train_flops: int
    seconds: float | None
    loss: float


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """How often a search got stuck; see `stuck.stuck_counts`."""

    updates: int
    unchanged: int
    no_better: int
    stuck: int
    longest_stuck: int
    resets: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a run's micro-batches order candidates as all validation text does; see `ranking.rank_agreement`."""

    updates: int
    kendall_tau: float | None
    correlation: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A compared run. What its summary has is None where it diverged; what it took together with others is None."""

    method: str
    seed: int
    sparsity: float
    match: str
    budget: float
    budget_deviation: float | None
    learning_rate: float
    settings: Mapping[str, float] = field(default_factory=dict)
    diverged: bool
    test_loss: float | None = None
    validation_loss: float | None
    validation_perplexity: float | None
    teacher_validation_loss: float | None
    train_flops: int | None
    train_flops_by_part: Mapping[str, int] | None
    train_flops_dense_equivalent: int | None
    tokens: int | None
    steps: int | None
    parameters: int | None
    nnz: int | None
    nnz_target: int | None = left_out_field()
    seconds: float | None
    seconds_by_part: Mapping[str, float] | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    study_flops: int | None
    device: str | None
    torch: str | None
    stacked: bool = False
    state_bytes: int | None = left_out_field()
    accepted_updates: int | None = left_out_field()
    updates: int | None = left_out_field()
    rule: str | None = left_out_field()
    moves: bool | None = left_out_field()
    beside: bool = False
    base_method: str
    run: str
    curve: tuple[CurvePoint, ...]
    stuck: Stuck | None = None
    tasks: tuple[TaskScores, ...] | None = left_out_field()
    ranking: Agreement | None = left_out_field()

    def loss(self, name: Loss) -> float | None:
        """One of its two losses."""
        return self.test_loss if name == "test_loss" else self.validation_loss


@dataclass(frozen=True, kw_only=True)
class Look:
    """A look of tuning along a setting: the values tried, the loss of each (None: it diverged), and the best."""

    setting: str
    around: Mapping[str, float]
    values: tuple[float, ...]
    added: tuple[float, ...]
    best: float | None
    losses: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """A run that tried a point of tuning."""

    learning_rate: float
    settings: Mapping[str, float] = field(default_factory=dict)
    validation_loss: float | None
    diverged: bool
    steps: int | None
    train_flops: int | None
    seconds: float | None
    run: str


@dataclass(frozen=True, kw_only=True)
class TuningRow:
    """What the tuning of a method at a sparsity found and took; edges: settings whose best value is at an end."""

    method: str
    sparsity: float
    learning_rate: float
    settings: Mapping[str, float]
    at_edge: bool
    edges: tuple[str, ...]
    train_flops: int
    looks: tuple[Look, ...]
    trials: tuple[TrialRow, ...]

    @property
    def has_failed(self) -> bool:
        """Whether every trial diverged, so that no value is the best."""
        return bool(self.trials) and all(trial.diverged for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class RankingRow:
    """`Agreement` of the runs of a method at a sparsity, with intervals over seeds."""

    sparsity: float
    method: str
    updates: int
    study_flops: int
    kendall_tau: Interval | None
    correlation: Interval | None


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A paired difference with its interval and test; p_holm: adjusted over all of its family that were not planned."""

    n: int
    mean: float
    low: float | None
    high: float | None
    t: float | None
    p: float | None
    p_holm: float | None

    @property
    def interval(self) -> Interval:
        """Its mean and bounds."""
        return Interval(self.n, self.mean, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class EquivalentTokens:
    """How many times its tokens the reference would need, at a difference and at its ends, and how that is known."""

    ratio: float | None
    low: float | None
    high: float | None
    more_tokens: float | None
    how: str


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """A method at a sparsity over its seeds: means and intervals of the runs that did not diverge, and their number."""

    method: str
    sparsity: float
    test_loss: Interval | None = None
    validation_loss: Interval | None
    diverged: int
    learning_rate: float
    settings: Mapping[str, float] = field(default_factory=dict)
    train_flops: float | None
    tokens: float | None
    steps: float | None
    seconds: float | None
    parameters: float | None
    state_bytes: float | None
    accepted_updates: float | None
    updates: float | None
    difference: Paired | None
    equivalent_tokens: EquivalentTokens | None
    planned: bool
    verdict: Verdict

    def loss(self, name: Loss) -> Interval | None:
        """One of its two losses."""
        return self.test_loss if name == "test_loss" else self.validation_loss


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A planned difference, `a` less `b`."""

    sparsity: float
    a: str
    b: str
    difference: Paired | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a method and the dense model took to the same loss: means, and the geometric mean of the ratio."""

    own: float
    dense: float
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class EqualLossRow:
    """Time to equal loss; see `equal_loss.equal_loss`."""

    sparsity: float
    method: str
    against: str
    seeds: int
    loss: float
    low: int
    steps: Measure
    train_flops: Measure
    seconds: Measure | None


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The method that is better than every other at a sparsity; None: there is none."""

    sparsity: float
    winner: str | None


@dataclass(frozen=True, kw_only=True)
class AskedTuning:
    """What is read of a plan's tuning."""

    share: float
    budget: float | None = None
    seed: int
    grid: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is read of a plan in results, which may be of an earlier version."""

    preset: str
    match: Literal["flops", "tokens", "steps"]
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]
    tuning: AskedTuning


@dataclass(frozen=True, kw_only=True)
class Results(Planned[Asked]):
    """results.json: the runs, what tuning found, and what they say together; trial_share: of a run, its length."""

    asks: ClassVar[type[Any]] = Asked
    kind: Literal["comparison", "ablation", "sensitivity"]
    complete: bool
    sparsae: str
    reference: str
    judged_by: Loss
    plan: Mapping[str, Any]
    rows: tuple[Row, ...]
    trial_share: float
    tuning: tuple[TuningRow, ...]
    ranking: tuple[RankingRow, ...] | None = left_out_field()
    summary: tuple[SummaryRow, ...]
    contrasts: tuple[Contrast, ...]
    equal_loss: tuple[EqualLossRow, ...] = ()
    tasks: tuple[MethodScores, ...] | None = left_out_field()
    conclusions: tuple[Conclusion, ...]
    warnings: tuple[str, ...]

    @property
    def methods(self) -> list[str]:
        """Names of what was compared, in the order of the rows."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def is_stacked(self) -> bool:
        """Whether runs trained together: then no time is any run's own."""
        return any(row.stacked for row in self.rows)
