"""What is written of tasks: a fine-tuning that ended, a run's fine-tunings together, and what lm-eval was answered.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsae.core.intervals import Interval
from sparsae.tasks.settings import TopologyMode


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fine-tuning gave: the scores of its end, those after each epoch, and what it cost.

    shortened: examples, of all, that were longer than the model may read. rule: what moved connections, if anything;
    swaps: how many it replaced. made_with: all that it depends on, in its file.
    """

    scores: Mapping[str, float]
    epochs: tuple[Mapping[str, float], ...]
    training_loss: float
    nnz: int
    parameters: int
    shortened: int
    rule: str | None = None
    swaps: int = 0
    seconds: float = 0.0
    made_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The mean over seeds, with its 95 % interval, and each seed's value."""

    n: int
    mean: float
    low: float | None
    high: float | None
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """A task with one topology, over all seeds: scores by metric, the majority class's, and what data they are of.

    held_out: whether validation examples are training examples that were held out. available_examples: what there was
    to train on; shortened: examples that were longer than the model may read.
    """

    task: str
    title: str
    topology: TopologyMode
    scores: Mapping[str, Score]
    majority: Mapping[str, float]
    train_examples: int
    available_examples: int
    validation_examples: int
    held_out: bool
    shortened: int
    rule: str | None
    swaps: int


@dataclass(frozen=True, kw_only=True)
class TaskRow(TaskScores):
    """The same, with the score of each seed after each epoch, and what it cost."""

    epochs: Mapping[str, tuple[float, ...]]
    nnz: int
    parameters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MeanScore(Score):
    """The mean over tasks, of one topology."""

    topology: TopologyMode


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """results.json of a run's fine-tunings. run_of: of its manifest; step: of the checkpoint that they begin with."""

    run: str
    method: str
    sparsity: float
    run_of: str
    step: int
    settings: Mapping[str, Any]
    rows: tuple[TaskRow, ...]
    means: tuple[MeanScore, ...]


@dataclass(frozen=True, kw_only=True)
class MethodScores:
    """A compared method at a sparsity, with one topology: each task's mean score over runs, and the mean over tasks."""

    method: str
    sparsity: float
    topology: TopologyMode
    tasks: Mapping[str, Interval]
    mean: Interval


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of lm-eval; stderr: None where it has none."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A task or group of lm-eval: its metrics, the number of questions, and solved examples before each."""

    metrics: Mapping[str, Metric]
    questions: int
    fewshot: int | None


@dataclass(frozen=True, kw_only=True)
class HarnessScores:
    """What a run's model, or its teacher, scored. limit: questions of each task at most."""

    step: int
    teacher: bool
    tasks: Mapping[str, Answered]
    lm_eval: str
    limit: int | None
