"""How initial values and learning rates depend on a model's width and on its layers' densities."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.effect import Idle
from sparsae.config.section import Count, Positive, Section

_STANDARD = Idle(lambda own, _: own.name == "sp", "name is sp: nothing follows the width")


class ParameterizationConfig(Section):
    """Standard, maximal-update or sparse maximal-update parameterization."""

    name: Literal["sp", "mup", "supar"] = Field(
        default="sp",
        description="standard, µP (settings transfer over width) or SµPar (over width and density)",
    )
    base_width: Annotated[Count, _STANDARD] = Field(
        default=256, description="width at which the settings were tuned (mup, supar)"
    )
    base_density: Annotated[
        float, Field(gt=0.0, le=1.0), Idle(lambda own, _: own.name != "supar", "name is not supar")
    ] = Field(default=1.0, description="density at which the settings were tuned (supar)")
    initial_fan_in: Literal["active", "dense"] = Field(
        default="active",
        description="initial variances divided by the layer's density, or as in a dense layer (sp, mup)",
    )
    initial_scale: Positive = Field(
        default=1.0, description="factor on the standard deviation of all initial weights, 0.02 at the base width"
    )
    hidden_scale: Positive = Field(
        default=1.0, description="factor on the standard deviation of hidden layers alone, beside initial_scale"
    )
    embedding_multiplier: Positive = Field(default=1.0, description="factor on the embeddings")
    output_multiplier: Positive = Field(default=1.0, description="factor on the logits, beside the width's own")
    weight_decay: Annotated[Literal["independent", "coupled"], _STANDARD] = Field(
        default="independent",
        description="a step decays by the schedule's learning rate, or by the layer's own scaled one",
    )
    scale_epsilon: Annotated[bool, _STANDARD] = Field(
        default=True, description="AdamW's epsilon follows the size of gradients (mup, supar)"
    )
    dynamic: bool = Field(
        default=False, description="learning rates and grown weights follow each layer's live density (supar)"
    )

    @model_validator(mode="after")
    def _density_counts(self) -> Self:
        if self.name == "supar" and self.initial_fan_in != "active":
            what = "name supar divides initial variances by the density: initial_fan_in must be active"
            raise SettingError(what, "initial_fan_in", "name")
        if self.dynamic and self.name != "supar":
            what = f"dynamic needs rates that depend on density, which {self.name}'s do not: set name supar"
            raise SettingError(what, "dynamic", "name")
        return self
