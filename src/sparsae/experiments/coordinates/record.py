"""What coordinates.json holds, which is results.json where a page is written of it again. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sparsae.experiments.record import Planned

Axis = Literal["density", "width"]
Quantity = Literal["activation", "gradient", "update"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A scale at a width and sparsity: the geometric mean over seeds."""

    width: int
    sparsity: float
    density: float
    scale: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A slope of a layer in a step, at the width or sparsity that is held fixed (the other one is None)."""

    parameterization: str
    axis: Axis
    width: int | None
    sparsity: float | None
    layer: str
    quantity: Quantity
    step: int
    slope: float
    wanted: float
    within: bool
    points: tuple[Point, ...]

    @property
    def held(self) -> float:
        """The width or sparsity that is held fixed."""
        found = self.width if self.axis == "density" else self.sparsity
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """The slopes of a quantity over layers, steps and whatever is held fixed."""

    parameterization: str
    axis: Axis
    quantity: Quantity
    wanted: float
    slopes: int
    smallest: float
    median: float
    largest: float
    share_within: float


@dataclass(frozen=True, kw_only=True)
class Short:
    """A run that diverged after so many steps."""

    parameterization: str
    width: int
    sparsity: float
    seed: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is read of a plan in results."""

    preset: str
    method: str
    parameterizations: tuple[str, ...]
    layers: int
    steps: int
    learning_rate: float
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Results(Planned[Asked]):
    """The slopes, and what they say together. tolerance: how far from what is wanted a slope is within it."""

    asks: ClassVar[type[Any]] = Asked
    kind: Literal["coordinates"]
    sparsae: str
    plan: Mapping[str, Any]
    tolerance: float
    summary: tuple[SummaryRow, ...]
    rows: tuple[Row, ...]
    without_slope: tuple[str, ...]
    diverged: tuple[Short, ...]

    @property
    def warnings(self) -> list[str]:
        """Layers without a slope, and runs that ended early."""
        lacking = ", ".join(self.without_slope)
        layers = [f"no slope over density for {lacking}: least_fan_in leaves fewer than two densities"]
        return (layers if lacking else []) + [
            f"{each.parameterization} at width {each.width}, sparsity {each.sparsity:g}, seed {each.seed}: "
            f"diverged after {each.steps} steps"
            for each in self.diverged
        ]
