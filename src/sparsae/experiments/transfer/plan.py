"""What a transfer experiment sweeps: its plan, from a YAML file and the command line. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsae.config import Config
from sparsae.config.complaints import nearest
from sparsae.config.load import methods
from sparsae.experiments.grid import SAID, Base, check_names
from sparsae.experiments.plan import BasePlan, Seed

Width = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
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


class TransferPlan(BasePlan):
    """Learning rates, and scales of initial values, at every width and sparsity under every parameterization."""

    kind: Literal["transfer"] = Field(default="transfer", description="what is asked")
    method: str = Field(default="static", description="the method of every sparse run; sparsity 0 is dense")
    parameterizations: list[str] = Field(
        default=["sp", "mup", "supar"], min_length=1, description="of: sp, sp-active, mup, mup-active, supar"
    )
    widths: list[Width] = Field(default=[256], min_length=1, description="model widths")
    sparsities: list[Share] = Field(default=[0.5, 0.75, 0.9], min_length=1, description="sparsities; 0: dense")
    learning_rates: list[Value] = Field(
        default=[2.0**-n for n in range(11, 4, -1)], min_length=1, description="peak learning rates"
    )
    initial_scales: list[Value] = Field(
        default=[1.0], min_length=1, description="factors on the standard deviation of all initial weights"
    )
    heads: Literal["scaled", "constant"] = Field(
        default="scaled", description="attention heads of one size, more of them in wider models; or of one number"
    )
    seeds: list[Seed] = Field(default=[0], min_length=1, description="seeds, or how many")

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        if method not in methods():
            raise ValueError(f"no method '{method}'; {nearest(method, methods())}")
        return method

    @field_validator("learning_rates", "initial_scales")
    @classmethod
    def _in_order(cls, values: list[float]) -> list[float]:
        return sorted(values)

    @model_validator(mode="after")
    def _sweeps(self) -> Self:
        check_names(self.parameterizations, self.method)
        if max(len(self.learning_rates), len(self.initial_scales)) < 2:
            raise ValueError("learning_rates: one value is no sweep: give two or more, or two or more initial_scales")
        return self

    def said(self) -> dict[str, str]:
        """See `BasePlan`."""
        return {
            **SAID,
            "training.learning_rate": "learning_rates",
            "parameterization.initial_scale": "initial_scales",
        }

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
        return Base(self.preset, self.method, self.heads, [(self.settings, "settings")])

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
