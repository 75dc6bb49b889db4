"""Rows of metrics.jsonl that tell of topologies; docs/configuration.md says what their fields mean. Needs no torch."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sparsae.core.record import encode, field_names, left_out_field, open_field


@dataclass(frozen=True)
class Row(ABC):
    """What was measured at a step. Losses are in nats a token, counts are from the start of the run."""

    kind: ClassVar[str]

    step: int

    def to_dict(self) -> dict[str, Any]:
        """The row as it is written."""
        return {"kind": self.kind, **encode(self)}


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """A topology that was or might have been scored: the terms of its score by name, NaN where it was not scored."""

    proposer: str
    swaps: int
    terms: Mapping[str, float] = open_field()
    score: float
    rejected: str | None
    validation_cross_entropy: float | None = left_out_field()

    @property
    def is_scored(self) -> bool:
        """Whether its score is a number."""
        return math.isfinite(self.score)


@dataclass(frozen=True, kw_only=True)
class AgeRow:
    """How old the active units are, in steps."""

    mean: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A sparse layer after an update; `units` is the size of its full matrix."""

    shape: tuple[int, ...] = ()  # earlier versions did not write it
    nnz: int
    units: int
    density: float
    swaps: int
    gradient_activity: float
    dead_outputs: int
    dead_inputs: int
    head_densities: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class TopologyRow(Row):
    """A topology update, or at step 0 the first topology.

    numbers: what the rule's telemetry and the notes of its decision add, by name.
    """

    kind = "topology"

    accepted: bool
    chosen: int | None
    candidates: tuple[CandidateRow, ...]
    current: CandidateRow | None
    numbers: Mapping[str, Any] = open_field()
    nnz: int
    swaps: int
    hamming_start: float
    hamming_last: float
    itop_rate: float
    age: AgeRow
    layers: Mapping[str, LayerRow]
    skipped: Literal["gradient", "step"] | None = None  # earlier versions did not write it
    seconds: float

    def __post_init__(self) -> None:
        if self.chosen is not None and self.chosen not in range(len(self.candidates)):
            raise ValueError(f"chosen: must be one of {len(self.candidates)} candidates, not {self.chosen}")

    def number(self, name: str) -> float:
        """One of `numbers`; NaN where there is none of this name, or it is none."""
        found = self.numbers.get(name)
        return float(found) if isinstance(found, int | float) else math.nan

    @property
    def best(self) -> CandidateRow | None:
        """The scored candidate with the lowest score."""
        return min((each for each in self.candidates if each.is_scored), key=lambda each: each.score, default=None)

    @property
    def taken(self) -> CandidateRow | None:
        """The candidate that the topology was changed to; None also where only a schedule changed it."""
        return self.candidates[self.chosen] if self.accepted and self.chosen is not None else None


RESERVED = frozenset({"kind", *field_names(TopologyRow)})
"""Names that nothing in `TopologyRow.numbers` can have."""
