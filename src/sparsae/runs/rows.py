"""The rows of metrics.jsonl, one class a kind; docs/configuration.md says what their fields mean. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparsae.config.complaints import nearest, shown
from sparsae.core.record import decode
from sparsae.errors import InputError
from sparsae.search.rows import Row, TopologyRow

__all__ = [
    "KINDS",
    "TIMES",
    "DivergedRow",
    "ExtendedRow",
    "Row",
    "SkippedRow",
    "TopologyRow",
    "TrainRow",
    "ValidationRow",
    "perplexity",
    "read_row",
]


@dataclass(frozen=True, kw_only=True)
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
    flops_per_second: float | None = None
    mfu: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationRow(Row):
    """Held-out losses."""

    kind = "validation"

    tokens: int
    loss: float
    perplexity: float
    teacher_loss: float | None
    train_flops: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ExtendedRow(Row):
    """A run of `previous_steps` goes on to `steps`; the learning rate rises again over `warmup_steps`."""

    kind = "extended"

    previous_steps: int
    steps: int
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class SkippedRow(Row):
    """A step whose batch changed no weight: `reason` is what was not finite."""

    kind = "skipped"

    tokens: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class DivergedRow(Row):
    """The last row of a run that cannot go on: `reason` is what was not finite."""

    kind = "diverged"

    tokens: int
    reason: str


# What is measured with a clock, and no function of the settings.
TIMES = frozenset({"seconds", "tokens_per_second", "flops_per_second", "mfu"})
KINDS: Mapping[str, type[Row]] = {
    kind.kind: kind for kind in (TrainRow, ValidationRow, TopologyRow, ExtendedRow, SkippedRow, DivergedRow)
}


def read_row(content: Mapping[str, object], origin: str) -> Row:
    """The row that `Row.to_dict` made this of. InputError, which names the origin and the field, for anything else."""
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{origin}: kind: no row of metrics is {shown(kind)}; {nearest(str(kind), KINDS)}")
    return decode(KINDS[kind], {name: value for name, value in content.items() if name != "kind"}, origin)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
