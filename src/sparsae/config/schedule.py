"""How a model's density moves over a run, under a rule that by itself keeps it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.section import Positive, Section, Share
from sparsae.config.span import Span

# (factor, start, stop, rise_start, rise_stop) where settings leave them open.
_DEFAULTS = {"bump": (2.0, 0.25, 0.70, None, None), "restore": (0.25, 0.0, 0.15, 0.70, 0.90)}


class ScheduleConfig(Section):
    """Every kind ends at the sparsity that is set; what is null has the kind's own default."""

    kind: Literal["constant", "bump", "restore"] = Field(
        default="constant",
        description="density over the run: constant; bump: begins at factor times the density, and falls to it; "
        "restore: falls to factor times the density, and rises to it again",
    )
    factor: Positive | None = Field(
        default=None,
        description="times the density, at the start (bump; null: 2) or in the middle (restore; null: 0.25)",
    )
    start: Share | None = Field(
        default=None, description="share of the run at which density begins to fall; null: 0.25 (bump), 0 (restore)"
    )
    stop: Share | None = Field(
        default=None, description="share of the run at which it has fallen; null: 0.70 (bump), 0.15 (restore)"
    )
    rise_start: Share | None = Field(
        default=None, description="share of the run at which density begins to rise (restore; null: 0.70)"
    )
    rise_stop: Share | None = Field(
        default=None, description="share of the run at which it has risen (restore; null: 0.90)"
    )
    every: Span | None = Field(
        default=None,
        description="between its steps: steps, 5%, 1 epoch; null: 1%, but with a rule that has updates it falls at "
        "each of them",
    )

    @property
    def moves(self) -> bool:
        """Whether density is not the same throughout."""
        return self.kind != "constant"

    @property
    def first_factor(self) -> float:
        """The density of the untrained model, in terms of the last."""
        return self.in_full.factor or 1.0 if self.kind == "bump" else 1.0

    @property
    def in_full(self) -> ScheduleConfig:
        """With the kind's defaults in the place of null, but for `every`."""
        if not self.moves:
            return self
        names = ("factor", "start", "stop", "rise_start", "rise_stop")
        own = {name: getattr(self, name) for name in names}
        return self.model_copy(
            update={
                name: default if own[name] is None else own[name]
                for name, default in zip(names, _DEFAULTS[self.kind], strict=True)
            }
        )

    @model_validator(mode="after")
    def _belongs_to_its_kind(self) -> Self:
        idle = {
            "constant": ("factor", "start", "stop", "rise_start", "rise_stop", "every"),
            "bump": ("rise_start", "rise_stop"),
            "restore": (),
        }[self.kind]
        if given := [name for name in idle if getattr(self, name) is not None]:
            what = f"{given[0]} is not for kind {self.kind}: leave it out, or choose another kind"
            raise SettingError(what, given[0], "kind")
        full = self.in_full
        if self.kind == "bump" and not (full.factor or 0) > 1:
            what = f"factor {full.factor:g} must be more than 1: kind bump begins denser than it ends"
            raise SettingError(what, "factor", "kind")
        if self.kind == "restore" and not (full.factor or 2) < 1:
            what = f"factor {full.factor:g} must be less than 1: kind restore is sparser in the middle"
            raise SettingError(what, "factor", "kind")
        for one, other in pairwise(("start", "stop", "rise_start", "rise_stop")):
            first, second = getattr(full, one), getattr(full, other)
            if second is not None and (first > second or (first == second and one != "stop")):
                raise SettingError(f"{one} {first:g} must come before {other} {second:g}", one, other, "kind")
        return self
