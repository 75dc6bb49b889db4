"""The settings of a Sparsifier in anybody's training loop."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sparsae.config.complaints import SettingError, dotted
from sparsae.config.density import Density
from sparsae.config.effect import Idle, idle_settings, is_default
from sparsae.config.rules import AnyRule, default_rule
from sparsae.config.schedule import ScheduleConfig
from sparsae.config.section import Count, Section, Share, ShareOfMean
from sparsae.config.span import Horizon
from sparsae.config.teacher import TeacherConfig
from sparsae.errors import InputError
from sparsae.registry import RULES

# For `model_validate(settings, context=TOLD)`: whoever gave the settings was told which of them have no effect.
TOLD = {"told": True}


class SparsifierConfig(Section):
    """What a Sparsifier does. The defaults are the method `sparsae` without a teacher.

    A setting that has no effect beside the others, and a value of its own, is refused.
    """

    steps: Annotated[int, Field(ge=1)] = Field(description="optimizer steps of the whole training: schedules end there")
    topology: AnyRule = Field(default_factory=default_rule)
    rules: dict[str, AnyRule] = Field({}, description="other rules for layers whose names match these patterns")
    teacher: Annotated[
        TeacherConfig, Idle(lambda config, _: not config.teacher.enabled, "teacher.enabled is false", but=("enabled",))
    ] = TeacherConfig(enabled=False)
    min_density: Share | None = Field(None, description="k_min of every layer; null: a quarter of the model's density")
    max_density: Share | None = Field(None, description="k_max of every layer; null: 4 times the model's density")
    head_min_density: Share = Field(0.0, description="floor of every attention head's density")
    fan_in: ShareOfMean | None = Field(
        None, description="least and most of a neuron's inputs by its layer's first mean"
    )
    fan_out: ShareOfMean | None = Field(None, description="least and most of an input's outputs, likewise")
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description="where a rule that prunes, or a schedule, ends; null: the model keeps its sparsity",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    budget: Literal["uniform", "er", "erk"] = Field(
        "erk", description="how density spreads over layers at the end of a rule that prunes layer by layer"
    )
    density: Density = Field({}, description="factors on what that budget gives, by name (glob) or depth")
    accumulation: Count = Field(1, description="backward passes an optimizer step")
    steps_per_epoch: Count | None = Field(
        None, description="optimizer steps of a pass over the data, for rules that count in epochs"
    )
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def horizon(self) -> Horizon:
        """How long the training is."""
        return Horizon(self.steps, self.steps_per_epoch)

    @field_validator("topology", mode="before")
    @classmethod
    def _a_name_is_no_rule(cls, topology: object) -> object:
        if isinstance(topology, str):
            example = topology if topology in RULES else "rigl"
            raise InputError(
                f"topology: must be the settings of a rule, such as {example.capitalize()}Config(), not '{topology}'"
            )
        return topology

    @model_validator(mode="after")
    def _all_have_an_effect(self, info: ValidationInfo) -> Self:
        if info.context != TOLD:
            for keys, why in idle_settings(self).items():
                if not is_default(self, keys):
                    raise SettingError(f"has no effect: {why}", dotted(keys))
        return self
