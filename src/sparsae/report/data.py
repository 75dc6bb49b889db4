"""A run directory as typed records.

A run may have stopped anywhere: without a summary, a sample or a single topology row. What a row leaves out or gives as
null is NaN here, so that a curve has a gap where there is no number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.registry import TERMS
from sparsae.rules import build_rule
from sparsae.rules.parts.rule import Rule
from sparsae.runs.directory import RunDirectory

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Train:
    """Means over the steps since the row before; losses in nats a token, counts from the start of the run."""

    step: int
    train_flops: float
    cross_entropy: float
    distillation: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    burn_in: bool
    nnz: float
    tokens: float

    @classmethod
    def of(cls, row: Row) -> Self:
        """From a row of metrics.jsonl."""
        return cls(
            step=_step(row),
            train_flops=number(row, "train_flops"),
            cross_entropy=number(row, "cross_entropy"),
            distillation=number(row, "distillation"),
            learning_rate=number(row, "learning_rate"),
            gradient_norm=number(row, "gradient_norm"),
            tokens_per_second=number(row, "tokens_per_second"),
            burn_in=row.get("burn_in") is True,
            nnz=number(row, "nnz"),
            tokens=number(row, "tokens"),
        )


@dataclass(frozen=True)
class Validation:
    """Held-out losses in nats a token."""

    step: int
    train_flops: float
    loss: float
    teacher_loss: float

    @classmethod
    def of(cls, row: Row) -> Self:
        """From a row of metrics.jsonl."""
        return cls(_step(row), number(row, "train_flops"), number(row, "loss"), number(row, "teacher_loss"))


@dataclass(frozen=True)
class Candidate:
    """A proposed topology with the terms of its score by name; NaN where it was not scored."""

    proposer: str
    terms: Mapping[str, float]
    score: float
    rejected: str | None

    @classmethod
    def of(cls, row: Row) -> Self:
        """From an entry of a topology row."""
        return cls(
            proposer=str(row.get("proposer", "unnamed")),
            terms={name: number(row, name) for name in row if name not in TERMS.reserved},
            score=number(row, "score"),
            rejected=row.get("rejected"),
        )


@dataclass(frozen=True)
class Layer:
    """A sparse layer after an update; `weights` is the size of its full matrix, `heads` the density of each head."""

    nnz: float
    weights: float
    density: float
    swaps: float
    gradient_activity: float
    dead_outputs: float
    heads: tuple[float, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, row: Row) -> Self:
        """From an entry of a topology row."""
        return cls(
            nnz=number(row, "nnz"),
            weights=number(row, "units"),
            density=number(row, "density"),
            swaps=number(row, "swaps"),
            gradient_activity=number(row, "gradient_activity"),
            dead_outputs=number(row, "dead_outputs"),
            heads=tuple(row.get("head_densities") or ()),
            shape=tuple(row.get("shape") or ()),
        )


@dataclass(frozen=True)
class Topology:
    """The outcome of one update, or (step 0) the topology that the run began with."""

    step: int
    accepted: bool
    chosen: int | None
    candidates: tuple[Candidate, ...]
    current: Candidate | None
    candidates_count: float
    mutation_rate: float
    reset_probability: float
    swaps: float
    hamming_start: float
    hamming_last: float
    itop_rate: float
    age_mean: float
    age_median: float
    age_max: float
    layers: Mapping[str, Layer]

    @classmethod
    def of(cls, row: Row) -> Self:
        """From a row of metrics.jsonl."""
        age, current = row.get("age") or {}, row.get("current")
        return cls(
            step=_step(row),
            accepted=row.get("accepted") is True,
            chosen=row.get("chosen"),
            candidates=tuple(Candidate.of(entry) for entry in row.get("candidates") or ()),
            current=Candidate.of(current) if current else None,
            candidates_count=number(row, "candidates_count"),
            mutation_rate=number(row, "mutation_rate"),
            reset_probability=number(row, "reset_probability"),
            swaps=number(row, "swaps"),
            hamming_start=number(row, "hamming_start"),
            hamming_last=number(row, "hamming_last"),
            itop_rate=number(row, "itop_rate"),
            age_mean=number(age, "mean"),
            age_median=number(age, "median"),
            age_max=number(age, "max"),
            layers={name: Layer.of(entry) for name, entry in (row.get("layers") or {}).items()},
        )

    @property
    def best(self) -> Candidate | None:
        """The scored candidate with the lowest score."""
        return min((c for c in self.candidates if not math.isnan(c.score)), key=lambda c: c.score, default=None)


@dataclass(frozen=True)
class RunData:
    """Everything that a report shows of a run."""

    path: Path
    config: Config
    train: tuple[Train, ...]
    validation: tuple[Validation, ...]
    topologies: tuple[Topology, ...]
    summary: Row | None
    sample: Row | None

    @cached_property
    def rule(self) -> Rule[Any]:
        """The rule that moved connections."""
        return build_rule(self.config.topology, self.config.rules)

    @cached_property
    def updates(self) -> tuple[Topology, ...]:
        """The topologies after the first: one an update."""
        return tuple(topology for topology in self.topologies if topology.step > 0)

    @cached_property
    def last_step(self) -> int:
        """The step that the metrics reach."""
        return max(row.step for rows in (self.train, self.validation, self.topologies) for row in rows)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the sparse layers, in the model's order."""
        return tuple(self.topologies[0].layers) if self.topologies else ()

    @property
    def totals(self) -> Row:
        """The summary, unless the run went on after it was written; then its totals are not this run's."""
        return self.summary if self.summary is not None and number(self.summary, "steps") >= self.last_step else {}

    @property
    def untrained_loss(self) -> float:
        """Validation loss before the first step, in nats; NaN if it was not measured."""
        return next((row.loss for row in self.validation if row.step == 0), math.nan)

    @property
    def unigram_loss(self) -> float:
        """Validation loss of a unigram model, in nats; NaN without a summary."""
        perplexity = number(self.summary or {}, "unigram_perplexity")
        return math.log(perplexity) if perplexity > 0 else math.nan

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that candidates were scored by."""
        scored = [candidate for update in self.updates for candidate in (update.current, *update.candidates)]
        return tuple(dict.fromkeys(name for candidate in scored if candidate for name in candidate.terms))

    def burn_in_spans(self) -> list[tuple[float, float]]:
        """(first, last) steps of the burn-in periods: after each accepted update, and wherever a row says so."""
        length = self.rule.burn_in.steps
        spans = [(u.step, u.step + length) for u in self.updates if u.accepted and length]
        flagged = [(row.step - 1, row.step) for row in self.train if row.burn_in]
        outside = [(a, b) for a, b in flagged if not any(start <= a and b <= end for start, end in spans)]
        return [(float(a), float(b)) for a, b in sorted(spans + outside)]


def read_run(path: Path) -> RunData:
    """The records of the run in the directory `path`.

    Raises InputError where there is no run, where a file of it is damaged, or where it has no metrics yet.
    """
    run = RunDirectory.open(path)
    rows = run.read_metrics()
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "validation", "topology")}
    if not any(kinds.values()):
        raise InputError(f"{run.metrics}: no metrics to report; train the run for at least one step first")
    return RunData(
        path=path,
        config=run.config(),
        train=tuple(Train.of(row) for row in kinds["train"]),
        validation=tuple(Validation.of(row) for row in kinds["validation"]),
        topologies=tuple(Topology.of(row) for row in kinds["topology"]),
        summary=run.outcome(run.summary) if run.summary.is_file() else None,
        sample=run.outcome(run.sample) if run.sample.is_file() else None,
    )


def number(row: Row, key: str) -> float:
    """The number under a key; NaN if it is missing, null or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _step(row: Row) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0
