"""What a check of coordinates measures: its plan, from a YAML file and the command line. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsae.config import Config
from sparsae.config.complaints import Origin, SettingError
from sparsae.config.section import Count
from sparsae.errors import InputError
from sparsae.experiments.grid import Base, GridPlan, Tree

# Beneath the settings that are given: real text, and few tokens, so that a step's change agrees with each one's input.
# Parameterizations promise the size of that part. Over many tokens the rest of Adam's signs is noise, which adds up to
# the root of the number of terms.
DEFAULTS: Tree = {"model": {"context": 8}, "training": {"batch_size": 1}, "data": {"tokenizer_vocab": 1024}}

# The first steps are full steps: a rate that stays, and gradients as they are.
FIXED: Tree = {
    "training": {
        "skip_limit": 0,
        "warmup": 0.0,
        "schedule": "constant",
        "final_learning_rate": 1.0,
        "clip": None,
        "accumulation": 1,
        "compile": False,
    },
    "teacher": {"enabled": False},
}


@dataclass(frozen=True)
class Case:
    """One short run."""

    parameterization: str
    width: int
    sparsity: float
    seed: int


class CoordinatesPlan(GridPlan):
    """Scales of activations, gradients and updates in the first steps."""

    kind: Literal["coordinates"] = Field(default="coordinates", description="what is asked")
    widths: list[Annotated[int, Field(ge=1)]] = Field(
        default=[128, 256, 512, 1024], min_length=1, description="model widths"
    )
    sparsities: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        default=[0.0, 0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375, 0.9921875],
        min_length=1,
        description="sparsities; 0: dense",
    )
    layers: Count = Field(default=2, description="transformer blocks")
    steps: Count = Field(default=10, description="optimizer steps that are measured")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=2.0**-9, description="learning rate of every step, without warm-up"
    )
    least_fan_in: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="slopes leave out layers whose outputs sum fewer weights, on average; 0: none"
    )

    @model_validator(mode="after")
    def _varies(self) -> Self:
        if len(self.widths) == len(self.sparsities) == 1:
            raise SettingError(
                "one width and one sparsity have no slope: give two or more of one", "widths", "sparsities"
            )
        return self

    def said(self) -> dict[str, str]:
        """See `BasePlan`."""
        check = {f"{section}.{key}": "method of measuring" for section, keys in FIXED.items() for key in keys}
        own = {"training.steps": "steps", "training.learning_rate": "learning_rate", "model.layers": "layers"}
        return {**super().said(), **own, **check}

    def base(self) -> Base:
        """See `GridPlan`."""
        own = {
            "model": {"layers": self.layers},
            "training": {"steps": self.steps, "learning_rate": self.learning_rate},
        }
        trees: list[tuple[Tree, Origin]] = [
            (DEFAULTS, "the check"),
            (self.settings, self.origin("settings")),
            (own, lambda keys: self.place(keys[-1])),
            (FIXED, "the check"),
        ]
        return Base(self.preset, self.method, self.heads, trees, self.place)

    def configs(self) -> Iterator[tuple[Case, Config]]:
        """Every run, small models first. Raises InputError for settings that are wrong."""
        base = self.base()
        for width in self.widths:
            for sparsity in self.sparsities:
                for name in self.parameterizations:
                    for seed in self.seeds:
                        config = base.config(name, width, sparsity, seed)
                        if config.initial_sparsity != config.sparsity.sparsity:
                            raise InputError(
                                f"{self.place('method')}: {self.method} starts at sparsity "
                                f"{config.initial_sparsity:g} everywhere: its first steps say nothing of density; use "
                                "one that keeps it, and no schedule"
                            )
                        yield Case(name, width, sparsity, seed), config
