"""The rows of metrics.jsonl, one class a kind; docs/configuration.md says what their fields mean. Needs no torch."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Row(ABC):
    """What was measured at a step. Losses are in nats a token, counts are from the start of the run."""

    kind: ClassVar[str]

    step: int

    def to_dict(self) -> dict[str, Any]:
        """The row as it is written."""
        return {"kind": self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True)
class TrainRow(Row):
    """Means over the steps since the row before, and where training is."""

    kind = "train"

    tokens: int
    loss: float
    cross_entropy: float
    distillation: float | None
    learning_rate: float
    gradient_norm: float
    nnz: int
    density: float
    burn_in: bool
    train_flops: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class ValidationRow(Row):
    """Held-out losses."""

    kind = "validation"

    tokens: int
    loss: float
    perplexity: float
    teacher_loss: float | None
    train_flops: int
    seconds: float


@dataclass(frozen=True)
class TopologyRow(Row):
    """A topology update, or at step 0 the first topology; `data` is the row, with what rule and scores add to it."""

    kind = "topology"

    data: Mapping[str, Any]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """From the row of an `Update`."""
        return cls(int(data["step"]), data)

    @property
    def accepted(self) -> bool:
        """Whether a new topology was taken."""
        return bool(self.data["accepted"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


@dataclass(frozen=True)
class ExtendedRow(Row):
    """A run of `previous_steps` goes on to `steps`; the learning rate rises again over `warmup_steps`."""

    kind = "extended"

    previous_steps: int
    steps: int
    warmup_steps: int


@dataclass(frozen=True)
class DivergedRow(Row):
    """The last row of a run that cannot go on: `reason` is what was not finite."""

    kind = "diverged"

    tokens: int
    reason: str
