"""Everything of a run directory that a report shows.

A run may have stopped anywhere: without a summary, a sample or a single topology row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.rules import build_rule
from sparsae.rules.parts.rule import Rule
from sparsae.runs.directory import RunDirectory
from sparsae.runs.rows import Row, TopologyRow, TrainRow, ValidationRow
from sparsae.runs.summary import Sample, Summary
from sparsae.search.rows import LayerRow


@dataclass(frozen=True)
class RunData:
    """Everything that a report shows of a run."""

    path: Path
    config: Config
    train: tuple[TrainRow, ...]
    validation: tuple[ValidationRow, ...]
    topologies: tuple[TopologyRow, ...]
    summary: Summary | None
    sample: Sample | None

    @cached_property
    def rule(self) -> Rule[Any]:
        """The rule that moved connections."""
        return build_rule(self.config.topology, self.config.rules)

    @cached_property
    def updates(self) -> tuple[TopologyRow, ...]:
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
    def last_layers(self) -> dict[str, LayerRow]:
        """The sparse layers as they were last, by name."""
        return dict(self.topologies[-1].layers) if self.topologies else {}

    @property
    def totals(self) -> Summary | None:
        """The summary, unless the run went on after it was written; then its totals are not this run's."""
        return self.summary if self.summary is not None and self.summary.steps >= self.last_step else None

    @property
    def reached(self) -> Summary | TrainRow | None:
        """Whichever tells how far training came and at what cost: the totals, or the last row before there are any."""
        return self.totals or (self.train[-1] if self.train else None)

    @property
    def steps(self) -> int:
        """Steps that were made."""
        return self.totals.steps if self.totals else self.last_step

    @property
    def untrained_loss(self) -> float:
        """Validation loss before the first step, in nats; NaN if it was not measured."""
        return next((row.loss for row in self.validation if row.step == 0), math.nan)

    @property
    def unigram_loss(self) -> float:
        """Validation loss of a unigram model, in nats; NaN without a summary."""
        perplexity = self.summary.unigram_perplexity if self.summary else math.nan
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
    rows: list[Row] = run.read_metrics(TrainRow, ValidationRow, TopologyRow)
    if not rows:
        raise InputError(f"{run.metrics}: no metrics to report; train the run for at least one step first")
    _refuse_other_layers(run, [row for row in rows if isinstance(row, TopologyRow)])
    return RunData(
        path=path,
        config=run.config(),
        train=tuple(row for row in rows if isinstance(row, TrainRow)),
        validation=tuple(row for row in rows if isinstance(row, ValidationRow)),
        topologies=tuple(row for row in rows if isinstance(row, TopologyRow)),
        summary=run.read_summary(),
        sample=run.read_sample(),
    )


def _refuse_other_layers(run: RunDirectory, topologies: Sequence[TopologyRow]) -> None:
    def heads(row: TopologyRow) -> dict[str, int]:
        return {name: len(layer.head_densities or ()) for name, layer in row.layers.items()}

    for row in topologies:
        if heads(row) != heads(topologies[0]):
            raise InputError(
                f"{run.metrics}: layers or heads in the topology row of step {row.step} are others than in the first; "
                "the file is damaged"
            )


def or_nan(value: float | None) -> float:
    """A number that may be missing, as NaN there: a curve has a gap."""
    return math.nan if value is None else value
