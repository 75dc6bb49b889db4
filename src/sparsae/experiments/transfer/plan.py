"""What a transfer experiment sweeps: its plan, from a YAML file and the command line. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsae.config import Config
from sparsae.config.complaints import SettingError
from sparsae.experiments.grid import Base, GridPlan

Value = Annotated[float, Field(gt=0.0)]


# What can be swept, by the name of its values in results.json; a plan has a list of each, in the plural.
Knob = Literal["learning_rate", "initial_scale", "embedding_multiplier"]
KNOBS: Mapping[Knob, str] = {
    "learning_rate": "training.learning_rate",
    "initial_scale": "parameterization.initial_scale",
    "embedding_multiplier": "parameterization.embedding_multiplier",
}


@dataclass(frozen=True)
class Point:
    """One run of a sweep. None: not given, so as in the settings."""

    parameterization: str
    width: int
    sparsity: float
    learning_rate: float
    initial_scale: float | None
    embedding_multiplier: float | None
    seed: int

    @property
    def name(self) -> str:
        """Of its directory below the experiment's."""
        more = {"init": self.initial_scale, "emb": self.embedding_multiplier}
        swept = "".join(f"-{key}{value:.9g}" for key, value in more.items() if value is not None)
        cell = f"{self.parameterization}-w{self.width}-s{self.sparsity:.9g}"
        return f"runs/{cell}-lr{self.learning_rate:.9g}{swept}-{self.seed}"


class TransferPlan(GridPlan):
    """Learning rates, scales of initial values and multipliers, at every width and sparsity."""

    kind: Literal["transfer"] = Field(default="transfer", description="what is asked")
    learning_rates: list[Value] = Field(
        default=[2.0**-n for n in range(11, 4, -1)], min_length=1, description="peak learning rates"
    )
    initial_scales: list[Value] = Field(
        default=[], description="factors on the standard deviation of all initial weights; none: the settings' own"
    )
    embedding_multipliers: list[Value] = Field(
        default=[], description="multipliers of the embeddings; none: the settings' own"
    )

    @field_validator("learning_rates", "initial_scales", "embedding_multipliers")
    @classmethod
    def _in_order(cls, values: list[float]) -> list[float]:
        return sorted(values)

    @model_validator(mode="after")
    def _sweeps(self) -> Self:
        if not self.knobs:
            raise SettingError(
                "one value is no sweep: give two or more, or two or more initial_scales or embedding_multipliers",
                "learning_rates",
            )
        return self

    def said(self) -> dict[str, str]:
        """See `BasePlan`."""
        return {**super().said(), **{key: f"{name}s" for name, key in KNOBS.items() if self._values(name)}}

    @property
    def knobs(self) -> list[Knob]:
        """What is swept: rows of results.json name their values so."""
        return [name for name in KNOBS if len(self._values(name)) > 1]

    def _values(self, knob: str) -> list[float]:
        found: list[float] = getattr(self, f"{knob}s")
        return found

    def _tried(self, knob: str) -> Sequence[float | None]:
        return self._values(knob) or (None,)

    def points(self) -> Iterator[Point]:
        """Every run, a whole seed before the next, small models first."""
        for seed, width, sparsity, parameterization, multiplier, scale, rate in product(
            self.seeds,
            self.widths,
            self.sparsities,
            self.parameterizations,
            self._tried("embedding_multiplier"),
            self._tried("initial_scale"),
            self.learning_rates,
        ):
            yield Point(parameterization, width, sparsity, rate, scale, multiplier, seed)

    @cached_property
    def _base(self) -> Base:
        return self.base()

    def config(self, point: Point) -> Config:
        """The settings of one run. Raises InputError for settings that are wrong."""
        values = {name: value for name in KNOBS if (value := getattr(point, name)) is not None}
        given = {self.place(f"{name}s"): (KNOBS[name], value) for name, value in values.items()}
        return self._base.config(point.parameterization, point.width, point.sparsity, point.seed, **given)
