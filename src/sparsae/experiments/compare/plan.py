"""What a comparison compares: its plan. Needs no torch.

A plan names variants (a method and settings), sparsities and seeds, what the runs are matched on, and the learning
rates among which each variant finds its own. Whatever has a default may be left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sparsae.config import Config, Section
from sparsae.config.complaints import SettingError, nearest, shown, unknown_name
from sparsae.config.effect import Idle, idle_settings
from sparsae.config.held_out import HELD_OUT, held_out
from sparsae.config.load import has_sparsity, resolve, setting_names
from sparsae.config.ranges import Range
from sparsae.config.shipped import methods
from sparsae.config.span import Span
from sparsae.errors import InputError
from sparsae.experiments.compare.tuning import Axis, Point
from sparsae.experiments.plan import BasePlan, Match, Seed, Tree, alike, given, leave_out, refuse_in_common, refuse_said
from sparsae.registry import method_named
from sparsae.tasks.settings import FinetuneConfig

Sparsity = Annotated[float, Field(gt=0.0, lt=1.0)]


def _is_number(value: Any) -> Any:
    """A union's own errors name the type that was tried last, which says nothing of the setting's."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {shown(value)}")
    if not abs(value) <= sys.float_info.max:  # a whole number may be larger, and NaN is not less
        raise ValueError(f"must be a finite number, not {shown(value)}")
    if value < 0:
        raise ValueError(f"must be at least 0, not {shown(value)}")
    return value


Number = Annotated[int | float, BeforeValidator(_is_number)]  # a whole one stays whole

Contrast = Annotated[tuple[str, str], BeforeValidator(lambda pair: tuple(pair) if isinstance(pair, list) else pair)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_LONGEST_NAME = 64  # characters; a run's directory is named by its sparsity, seed and tuned settings besides


class Variant(Section):
    """A method, by the name under which it is compared."""

    method: str = Field(description="a method by name")
    settings: Tree = Field(default={}, description="settings of its own, in the form of a settings file")
    match: Match | None = Field(default=None, description="what its runs are matched on; null: as the plan says")

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        method = method_named(method)
        if method not in methods():
            raise ValueError(unknown_name("method", method, methods()))
        return method


LEARNING_RATE = "training.learning_rate"
_STEPS = "training.steps"
_EVERY = "topology.every"


class Tuning(Section):
    """How each variant finds its learning rate, and what else is tuned."""

    learning_rates: list[Annotated[float, Field(gt=0.0)]] = Field(
        default=[], description="the grid, tried by every variant at every sparsity; empty: no tuning"
    )
    grid: dict[str, list[Number]] = Field(
        default={},
        description="further settings and their values, tried one after another by every variant that has the setting "
        "and does not give it itself: {parameterization.initial_scale: [0.5, 1, 2], training.batch_size: [8, 16]}",
    )
    extensions: Annotated[int, Field(ge=0, le=20)] = Field(
        default=4, description="how many values may be added to a grid whose best one lies at its end"
    )
    rounds: Annotated[
        int,
        Field(ge=1, le=10),
        Idle(lambda tuning, _: bool(tuning.learning_rates) + len(tuning.grid) < 2, "not two settings are tuned"),
    ] = Field(default=1, description="how many times all settings are tried one after another")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="length of a trial in terms of a compared run; with a budget: the longest"
    )
    budget: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="FLOPs of the grids' trials in terms of the compared runs': trials are as long as it carries, all "
        "of one share; null: share",
    )
    seed: Seed = Field(default=1000, description="seed of the trials, outside the compared ones")

    @field_validator("learning_rates")
    @classmethod
    def _in_order(cls, rates: list[float]) -> list[float]:
        if len(rates) == 1:
            raise ValueError("one learning rate is no grid: set training.learning_rate, or give two or more")
        if what := alike(rates):
            raise ValueError(what)
        return sorted(rates)

    @field_validator("grid")
    @classmethod
    def _are_settings(cls, grid: dict[str, list[int | float]]) -> dict[str, list[int | float]]:
        names = setting_names()
        for name, values in grid.items():
            if name == LEARNING_RATE:
                raise SettingError("give it by learning_rates", name)
            if name == _STEPS:
                raise SettingError("what the runs are matched on gives every trial its length", name)
            if name not in names:
                raise SettingError(f"no setting '{name}'; {nearest(name, names)}", name)
            if name in HELD_OUT:
                what = "decides which held-out tokens the losses are of, so trials could not be compared"
                raise SettingError(f"{what}: give it by settings", name)
            if len(values) < 2:
                raise SettingError("give two or more values", name)
            if same := alike(values):
                raise SettingError(same, name)
        return {name: sorted(values) for name, values in grid.items()}


class ComparisonPlan(BasePlan):
    """A comparison of methods."""

    kind: Literal["comparison", "ablation", "sensitivity"] = Field(default="comparison", description="what is asked")
    methods: list[str] = Field(default=[], description="methods to compare as they are")
    variants: dict[str, Variant] = Field(default={}, description="further ones: a name, a method, its own settings")
    sparsities: list[Sparsity] = Field(default=[0.9], min_length=1, description="sparsities at which all are compared")
    match: Match = Field(default="flops", description="what the runs have in common")
    budget: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="how much of that; null: what the reference takes for training.steps"
    )
    also: Annotated[
        list[Match], Idle(lambda plan, _: plan.has_empty_match, "all runs but the reference's are matched on that")
    ] = Field(
        default=[],
        description="further matches: every variant but the reference is run under each too, in rows of its own "
        "(rigl@steps), with the settings that it was tuned to",
    )
    cadence: Annotated[
        Span | None, Idle(lambda plan, _: given(plan.settings, _EVERY), "settings give topology.every")
    ] = Field(
        default="2%",
        description="between updates of a rule whose own cadence is a number of steps, where the plan does not give "
        "topology.every; null: the rule's own",
    )
    reference: str | None = Field(
        default=None, description="what the others are held against; null: static, or the first"
    )
    planned: list[Contrast] = Field(
        default=[],
        description="contrasts that were planned before any run, [[a, b], ...]: a less b; p values of all other "
        "differences from the reference are adjusted (Holm), those under a further match by themselves",
    )
    tuning: Annotated[
        Tuning,
        Idle(
            lambda plan, _: not (plan.tuning.learning_rates or plan.tuning.grid),
            "nothing is tuned: give learning_rates or a grid",
            but=("learning_rates", "grid"),
        ),
    ] = Tuning()
    tasks: FinetuneConfig | None = Field(
        default=None, description="tasks that every compared run is fine-tuned on when all have ended; null: none"
    )

    @field_validator("methods")
    @classmethod
    def _methods_are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            if method_named(name) not in methods():
                variants = "a variant has its own name, and is compared without being named here"
                raise ValueError(f"{unknown_name('method', name, methods())} ({variants})")
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.variants:
            if not _NAME.fullmatch(name):
                what = f"'{name}' cannot name a directory: use letters, digits and . _ + -"
                raise SettingError(what, "variants")
            if len(name) > _LONGEST_NAME:
                what = f"{shown(name)} has {len(name)} characters, and names a directory: use at most {_LONGEST_NAME}"
                raise SettingError(what, "variants")
            if name in self.methods:
                raise SettingError(f"'{name}' is among the methods already; give it another name", "variants")
            refuse_said(self.variants[name].settings, f"variants.{name}.settings", self.said())
        for setting in self.tuning.grid:
            if setting in self.said():
                what = leave_out(setting, self.said()[setting])
                raise SettingError(what, "tuning.grid")
        refuse_said(self.settings, "settings", {"topology.rule": "methods"})
        if not self.named_variants:
            raise SettingError(f"name at least one of: {', '.join(methods())}", "methods")
        if self.reference is not None and self.reference not in self.named_variants:
            what = f"'{self.reference}' is not compared; {nearest(self.reference, self.named_variants)}"
            raise SettingError(what, "reference")
        if (self.tuning.learning_rates or self.tuning.grid) and self.tuning.seed in self.seeds:
            what = f"tuning.seed {self.tuning.seed} is one of the compared seeds; give another"
            raise SettingError(what, "tuning.seed", "seeds")
        for a, b in self.planned:
            for name in (a, b):
                if name not in self.all_variants:
                    raise SettingError(f"'{name}' is not compared; {nearest(name, self.all_variants)}", "planned")
            if a == b or (b, a) in self.planned:
                raise SettingError(f"{a} and {b}: two different variants, once", "planned")
        return self

    def said(self) -> dict[str, str]:
        """See `BasePlan`."""
        return {**super().said(), "method": "methods", "sparsity.sparsity": "sparsities"}

    @cached_property
    def named_variants(self) -> dict[str, Variant]:
        """What the plan names, by name and in order."""
        return {name: Variant(method=name) for name in self.methods} | self.variants

    @cached_property
    def all_variants(self) -> dict[str, Variant]:
        """Everything compared, by name and in order: what the plan names, and the same under further matches."""
        beside = {
            f"{name}@{match}": variant.model_copy(update={"match": match})
            for match in self.also
            for name, variant in self.named_variants.items()
            if name != self.held_against and (variant.match or self.match) != match
        }
        return self.named_variants | beside

    @property
    def has_empty_match(self) -> bool:
        """Whether a further match makes no row."""
        rows = {name.partition("@")[2] for name in self.all_variants} if self.named_variants else set(self.also)
        return not rows.issuperset(self.also)

    @property
    def held_against(self) -> str:
        """The reference's name."""
        return self.reference or ("static" if "static" in self.named_variants else next(iter(self.named_variants)))

    def tuned_as(self, variant: str) -> str:
        """The variant whose tuning a variant takes its settings from: under a further match, the one that is named."""
        return variant.partition("@")[0]

    def match_of(self, variant: str) -> Match:
        """What a variant's runs are matched on."""
        return self.all_variants[variant].match or self.match

    def uncounted(self) -> list[str]:
        """See `BasePlan`."""
        tuned, studied = bool(self.tuning.learning_rates or self.tuning.grid), self.kind == "sensitivity"
        return [
            *(["trials beyond the grids and after the first round, and what tuning changes"] if tuned else []),
            *(["fine-tuning on the tasks"] if self.tasks is not None else []),
            *(["the study of micro-batches"] if studied else []),
        ]

    def axes(self, variant: str, sparsity: float) -> list[Axis]:
        """What a variant's tuning looks along at a sparsity: not at what it gives itself, nor at what it has not."""
        tuning, own = self.tuning, self.all_variants[variant].settings
        axes = [Axis(LEARNING_RATE, tuple(tuning.learning_rates))] if tuning.learning_rates else []
        config = self.config(variant, sparsity, self.seeds[0]) if tuning.grid else None
        for setting, values in tuning.grid.items():
            if not given(own, setting) and config is not None and _concerns(config, setting):
                axes.append(Axis(setting, tuple(values), Range.of(config, setting)))
        return axes

    def config(
        self,
        variant: str,
        sparsity: float,
        seed: int,
        point: Point | None = None,
        on_idle: Callable[[Mapping[str, str]], None] | None = None,
    ) -> Config:
        """The settings of one run, at a point of its tuning. Raises InputError for settings that are wrong.

        on_idle: as `resolve` has it.
        """
        chosen = self.all_variants[variant]
        options: dict[str, tuple[str, object]] = {self.place("seeds"): ("seed", seed)}
        if has_sparsity(chosen.method):
            options[self.place("sparsities")] = ("sparsity.sparsity", sparsity)
        for setting, value in (point or {}).items():
            key = ("learning_rates",) if setting == LEARNING_RATE else ("grid", setting)
            options[self.place("tuning", *key)] = (setting, value)
        named = variant.partition("@")[0]
        own = self.origin("variants", named, "settings")
        trees = [(self.settings, self.origin("settings")), (chosen.settings, own)]
        more: Any = {"trees": trees, "counted_by": "an experiment", "on_idle": on_idle}
        config = resolve(None, self.preset, chosen.method, options=options, **more)
        absolute = isinstance(getattr(config.topology, "every", None), int)
        if self.cadence is not None and absolute and not any(given(tree, _EVERY) for tree, _ in trees):
            options = {self.place("cadence"): (_EVERY, self.cadence), **options}
            config = resolve(None, self.preset, chosen.method, options=options, **more)
        return config


def require_effect(plan: ComparisonPlan) -> None:
    """Raise InputError for settings that have no effect in any of the runs that they are given to."""
    everywhere: list[dict[str, str]] = []
    for variant, chosen in plan.named_variants.items():
        found: list[Mapping[str, str]] = []
        for sparsity in plan.sparsities:
            plan.config(variant, sparsity, plan.seeds[0], on_idle=found.append)
        everywhere += [{key: line for key, line in idle.items() if not given(chosen.settings, key)} for idle in found]
        refuse_in_common([{key: line for key, line in idle.items() if given(chosen.settings, key)} for idle in found])
    refuse_in_common(everywhere)
    for setting in plan.tuning.grid:
        if all(setting != a.setting for v in plan.named_variants for s in plan.sparsities for a in plan.axes(v, s)):
            place = plan.place("tuning", "grid", setting)
            raise InputError(f"{place}: has no effect: no variant has it without giving it itself")


def require_one_text(plan: ComparisonPlan) -> None:
    """Raise InputError where the runs' losses would be of different held-out tokens, so that none could be the lower.

    Only the settings of variants can make them so: all else of a plan is the same for all.
    """
    read = {name: held_out(plan.config(name, plan.sparsities[0], plan.seeds[0])) for name in plan.named_variants}
    expected = read[plan.held_against]
    for name, setting in product(read, HELD_OUT):
        if read[name][setting] != expected[setting]:
            pair = (name, plan.held_against)
            own = next((each for each in pair if given(plan.named_variants[each].settings, setting)), name)
            other = next(each for each in pair if each != own)
            place = plan.place("variants", own, "settings", *setting.split("."))
            what = f"the losses of {own} would be of other held-out tokens than those of {other}"
            raise InputError(f"{place}: {what}: give it by settings, to all runs")


def _concerns(config: Config, setting: str) -> bool:
    """Whether a run with these settings is another one if the setting is: a dense model has no sparse layers."""
    return given(config.model_dump(), setting) and tuple(setting.split(".")) not in idle_settings(config)


def cells(plan: ComparisonPlan) -> Iterator[tuple[int, float, str]]:
    """(seed, sparsity, variant) of every compared run, a whole seed before the next."""
    for seed in plan.seeds:
        for sparsity in plan.sparsities:
            for variant in plan.all_variants:
                yield seed, sparsity, variant
