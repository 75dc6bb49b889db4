"""What results.json of a transfer experiment holds; docs/parameterization.md explains it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sparsae.core.intervals import Interval
from sparsae.core.record import open_field
from sparsae.experiments.record import Planned
from sparsae.experiments.transfer.plan import Knob

Edge = Literal["lowest", "highest", "divergence"]
Over = Literal["sparsity", "width"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run. What its summary has is None where it diverged."""

    parameterization: str
    width: int
    sparsity: float
    learning_rate: float
    initial_scale: float
    embedding_multiplier: float = 1.0  # before there was one
    seed: int
    heads: int
    diverged: bool
    validation_loss: float | None
    steps: int | None
    tokens: int | None
    train_flops: int | None
    parameters: int | None
    nnz: int | None
    seconds: float | None
    device: str | None
    torch: str | None
    run: str

    def value(self, knob: Knob) -> float:
        """Of a setting that can be swept."""
        if knob == "learning_rate":
            return self.learning_rate
        return self.initial_scale if knob == "initial_scale" else self.embedding_multiplier


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A 95 % interval over n seeds."""

    n: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SeedOptimum:
    """The best value of a setting with one seed, the loss there, and the edge of what was tried that it lies at."""

    optimum: float
    loss: float
    edge: Edge | None


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best value of a setting at a width and sparsity, over all seeds and by each."""

    knob: Knob
    parameterization: str
    width: int
    sparsity: float
    optimum: float
    loss: float
    edge: Edge | None
    interval: Bounds | None
    by_seed: Mapping[str, SeedOptimum]
    diverged: int


@dataclass(frozen=True, kw_only=True)
class Best:
    """The values of all that was swept, by name, that led to the lowest loss at a width and sparsity."""

    parameterization: str
    width: int
    sparsity: float
    values: Mapping[str, float] = open_field()
    loss: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """A width and sparsity under a parameterization."""

    parameterization: str
    width: int
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class MovementRow:
    """How far the optimum of a setting moves; see `basins.Movement`."""

    knob: Knob
    over: Over
    parameterization: str
    factor: float
    factor_interval: Bounds | None
    slope: float | None
    slope_interval: Interval | None
    at_least: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is read of a plan in results."""

    preset: str
    method: str
    parameterizations: tuple[str, ...]
    widths: tuple[int, ...]
    sparsities: tuple[float, ...]
    learning_rates: tuple[float, ...]
    initial_scales: tuple[float, ...]
    embedding_multipliers: tuple[float, ...] = ()  # before there were any, none were swept

    @property
    def together(self) -> list[Knob]:
        """The settings that were swept, where they are two or more: then the best of each says little by itself."""
        values: dict[Knob, tuple[float, ...]] = {
            "learning_rate": self.learning_rates,
            "initial_scale": self.initial_scales,
            "embedding_multiplier": self.embedding_multipliers,
        }
        swept = [knob for knob, tried in values.items() if len(tried) > 1]
        return swept if len(swept) > 1 else []


@dataclass(frozen=True, kw_only=True)
class Results(Planned[Asked]):
    """results.json: the runs, where optima lie, and how far they move."""

    asks: ClassVar[type[Any]] = Asked
    kind: Literal["transfer"]
    complete: bool
    sparsae: str
    plan: Mapping[str, Any]
    rows: tuple[Row, ...]
    optima: tuple[Optimum, ...]
    best: tuple[Best, ...] = ()  # earlier versions did not write it
    without_optimum: tuple[Place, ...]
    movements: tuple[MovementRow, ...]
    warnings: tuple[str, ...]
