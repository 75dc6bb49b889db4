"""Settings of self-distillation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.effect import Idle
from sparsae.config.section import Count, NonNegative, Positive, Section, Share


class TeacherConfig(Section):
    """Self-distillation from an average of the student: loss = CE + alpha KL(teacher || student)."""

    enabled: bool = Field(default=True, description="keep a teacher and learn from it")
    alpha: NonNegative = Field(default=0.1, description="weight of the KL term")
    beta: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.999, description="decay of the average, a step")
    storage: Literal["union", "masked", "dense"] = Field(
        default="masked",
        description="what the teacher remembers: dropped weights as they fade, only active ones, or everything",
    )
    tolerance: Annotated[
        NonNegative,
        Idle(lambda teacher, _: teacher.storage != "union", "only a union teacher has dropped weights that fade"),
    ] = Field(default=1e-8, description="a dropped weight leaves a union teacher once its magnitude is below this")
    warmup: Literal["fraction", "validation"] = Field(
        default="fraction",
        description="no KL until a share of the steps has passed, or until validation improves past a threshold",
    )
    warmup_fraction: Annotated[
        Share, Idle(lambda teacher, _: teacher.warmup != "fraction", "teacher.warmup is validation")
    ] = Field(default=0.25, description="share of the steps without KL (fraction)")
    warmup_improvement: Annotated[
        Positive, Idle(lambda teacher, _: teacher.warmup != "validation", "teacher.warmup is fraction")
    ] = Field(default=0.5, description="nats under the untrained validation loss that end the warm-up (validation)")
    ramp: bool = Field(
        default=True, description="let the decay grow with the teacher's steps t: min(beta, (1 + t) / (10 + t))"
    )
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        description="share of the steps before the teacher, which begins there as a copy of the student; no KL before",
    )
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="share of the sequences that are taught; the teacher reads no others"
    )
    every: Count = Field(default=1, description="taught at every n-th step only")
    grown: Literal["zero", "student"] = Field(
        default="zero",
        description="a connection that the student grows begins in the teacher at 0 or what a union teacher remembers "
        "(zero), or at the student's value with a ramp of its own (student)",
    )

    @model_validator(mode="after")
    def _dense_forgets_nothing(self) -> Self:
        if self.grown == "student" and self.storage == "dense":
            what = "grown 'student' is for a union or masked teacher: a dense one keeps every position"
            raise SettingError(what, "grown", "storage")
        return self
