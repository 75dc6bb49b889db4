"""What a transfer experiment sweeps: its plan, from a YAML file and the command line. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsae.config import Config
from sparsae.experiments.grid import Base, GridPlan

Value = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    parameterization: str
    width: int
    sparsity: float
    learning_rate: float
    initial_scale: float
    seed: int

    @property
    def name(self) -> str:
        """Of its directory below the experiment's."""
        scale = "" if self.initial_scale == 1.0 else f"-init{self.initial_scale:.9g}"
        return (
            f"runs/{self.parameterization}-w{self.width}-s{self.sparsity:.9g}-lr{self.learning_rate:.9g}{scale}"
            f"-{self.seed}"
        )


class TransferPlan(GridPlan):
    """Learning rates, and scales of initial values, at every width and sparsity under every parameterization."""

    kind: Literal["transfer"] = Field(default="transfer", description="what is asked")
    learning_rates: list[Value] = Field(
        default=[2.0**-n for n in range(11, 4, -1)], min_length=1, description="peak learning rates"
    )
    initial_scales: list[Value] = Field(
        default=[1.0], min_length=1, description="factors on the standard deviation of all initial weights"
    )

    @field_validator("learning_rates", "initial_scales")
    @classmethod
    def _in_order(cls, values: list[float]) -> list[float]:
        return sorted(values)

    @model_validator(mode="after")
    def _sweeps(self) -> Self:
        if max(len(self.learning_rates), len(self.initial_scales)) < 2:
            raise ValueError("learning_rates: one value is no sweep: give two or more, or two or more initial_scales")
        return self

    def said(self) -> dict[str, str]:
        """See `BasePlan`."""
        rates, scales = "training.learning_rate", "parameterization.initial_scale"
        return {**super().said(), rates: "learning_rates", scales: "initial_scales"}

    @property
    def knobs(self) -> list[str]:
        """What is swept: rows of results.json name their values so."""
        swept = {"learning_rate": self.learning_rates, "initial_scale": self.initial_scales}
        return [name for name, values in swept.items() if len(values) > 1]

    def points(self) -> Iterator[Point]:
        """Every run, a whole seed before the next, small models first."""
        for seed in self.seeds:
            for width in self.widths:
                for sparsity in self.sparsities:
                    for parameterization in self.parameterizations:
                        for scale in self.initial_scales:
                            for rate in self.learning_rates:
                                yield Point(parameterization, width, sparsity, rate, scale, seed)

    @cached_property
    def _base(self) -> Base:
        return self.base()

    def config(self, point: Point) -> Config:
        """The settings of one run. Raises InputError for settings that are wrong."""
        return self._base.config(
            point.parameterization,
            point.width,
            point.sparsity,
            point.seed,
            learning_rates=("training.learning_rate", point.learning_rate),
            initial_scales=("parameterization.initial_scale", point.initial_scale),
        )
