"""One run's settings at a width, a sparsity and under a parameterization: what is varied where settings shall transfer.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sparsae.config import Config, ModelConfig
from sparsae.config.complaints import Origin, nearest, unknown_name
from sparsae.config.load import is_dense, resolve
from sparsae.config.section import OrHowMany
from sparsae.config.shipped import methods
from sparsae.errors import InputError
from sparsae.experiments.plan import BasePlan, Seed, given, refuse_in_common
from sparsae.registry import method_named

Tree = Mapping[str, Any]
Heads = Literal["scaled", "constant"]

# Settings of the section `parameterization` by name. SP and µP as they are published know nothing of density; "-active"
# corrects their initial values, and only those, for it.
PARAMETERIZATIONS: Mapping[str, Mapping[str, object]] = {
    "sp": {"name": "sp", "initial_fan_in": "dense", "dynamic": False},
    "sp-active": {"name": "sp", "initial_fan_in": "active", "dynamic": False},
    "mup": {"name": "mup", "initial_fan_in": "dense", "dynamic": False},
    "mup-active": {"name": "mup", "initial_fan_in": "active", "dynamic": False},
    "supar": {"name": "supar", "initial_fan_in": "active", "dynamic": False},
    "supar-dynamic": {"name": "supar", "initial_fan_in": "active", "dynamic": True},
}

# Settings that a grid gives to every run, and by which of its lists. model.width is free: it says at which width
# model.heads, model.head_size and model.mlp_width are as they are given.
SAID: Mapping[str, str] = {
    "seed": "seeds",
    "sparsity.sparsity": "sparsities",
    "parameterization.name": "parameterizations",
    "parameterization.initial_fan_in": "parameterizations",
    "parameterization.dynamic": "parameterizations",
}


# What says nothing of a model whose connections all exist: left out there.
OF_SPARSE = ("topology", "rules", "sparsity.schedule", "sparsity.max_density")


@dataclass(frozen=True)
class Base:
    """What all runs of a grid have in common.

    heads: "scaled", as many as keep the size that they have in the settings, or "constant", the settings' number of
    them at every width. trees: settings in the form of files, later ones winning, each with its origin. place: where a
    key of the plan was given. on_idle: as `resolve` has it.
    """

    preset: str
    method: str
    heads: Heads
    trees: Sequence[tuple[Tree, Origin]]
    place: Callable[..., str]
    on_idle: Callable[[Mapping[str, str]], None] | None = None

    def config(
        self, parameterization: str, width: int, sparsity: float, seed: int, **more: tuple[str, object]
    ) -> Config:
        """The settings of one run; sparsity 0 is the method `dense`. `more`: origin -> (key, value).

        Raises InputError for settings that are wrong, or a width that the heads cannot follow.
        """
        told: dict[str, tuple[str, object]] = {self.place("seeds"): ("seed", seed)}
        for key, value in PARAMETERIZATIONS[parameterization].items():
            told[f"{self.place('parameterizations')}: {parameterization}.{key}"] = (f"parameterization.{key}", value)
        method, trees = self.method, self.trees
        if sparsity > 0:
            told[self.place("sparsities")] = ("sparsity.sparsity", sparsity)
        else:
            method, trees = "dense", [(_without(tree, OF_SPARSE), at) for tree, at in trees]
        for key, value in self._of_width(width).items():
            told[f"{self.place('widths')}: {width}: {key}"] = (f"model.{key}", value)
        return resolve(
            None,
            self.preset,
            method,
            options={**told, **more},
            trees=trees,
            counted_by="an experiment",
            on_idle=self.on_idle,
        )

    @cached_property
    def _model(self) -> ModelConfig:
        return resolve(None, self.preset, self.method, trees=self.trees).model

    def _of_width(self, width: int) -> dict[str, int]:
        """The keys of the section `model` that follow the width."""
        model = self._model
        found = {"width": width}
        if self.heads == "scaled":
            found["heads"] = self._scaled("heads", model.heads, width)
            if model.kv_heads is not None:
                found["kv_heads"] = self._scaled("kv_heads", model.kv_heads, width)
        elif model.head_size is not None:
            found["head_size"] = self._scaled("head_size", model.head_size, width)
        if model.mlp_width is not None:
            found["mlp_width"] = max(1, round(model.mlp_width * width / model.width))
        return found

    def _scaled(self, name: str, value: int, width: int) -> int:
        base = self._model.width
        if value * width % base:
            raise InputError(
                f"{self.place('widths')}: {width}: model.{name} would be {value * width / base:g}, being {value} at "
                f"width {base}: give widths that keep it whole, or constant heads"
            )
        return value * width // base


def _without(tree: Tree, settings: Iterable[str]) -> Tree:
    """A copy of a tree that says nothing of these settings."""
    found = dict(tree)
    for setting in settings:
        key, _, rest = setting.partition(".")
        if not rest:
            found.pop(key, None)
        elif isinstance(found.get(key), dict):
            found[key] = _without(found[key], [rest])
    return found


class GridPlan(BasePlan):
    """The plan of an experiment over a grid."""

    method: str = Field(default="static", description="the method of every sparse run; sparsity 0 is dense")
    parameterizations: list[str] = Field(
        default=["sp", "mup", "supar"], min_length=1, description=f"of: {', '.join(PARAMETERIZATIONS)}"
    )
    widths: list[Annotated[int, Field(ge=1)]] = Field(default=[256], min_length=1, description="model widths")
    sparsities: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        default=[0.5, 0.75, 0.9], min_length=1, description="sparsities; 0: dense"
    )
    heads: Heads = Field(
        default="scaled", description="attention heads of one size, more of them in wider models; or of one number"
    )
    seeds: Annotated[list[Seed], OrHowMany] = Field(default=[0], min_length=1, description="seeds, or how many")

    @field_validator("method")
    @classmethod
    def _has_a_sparsity(cls, method: str) -> str:
        method = method_named(method)
        if method not in methods():
            raise ValueError(unknown_name("method", method, methods()))
        if is_dense(method):
            raise ValueError(f"'{method}' has no sparsity to vary: dense models are those of sparsity 0")
        return method

    @field_validator("parameterizations")
    @classmethod
    def _are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in PARAMETERIZATIONS:
                raise ValueError(f"no '{name}'; {nearest(name, PARAMETERIZATIONS)}")
        return names

    def said(self) -> dict[str, str]:
        """See `BasePlan`."""
        return dict(SAID)

    def base(self) -> Base:
        """What all runs have in common."""
        return Base(self.preset, self.method, self.heads, [(self.settings, self.origin("settings"))], self.place)

    def require_effect(self) -> None:
        """Raise InputError for settings that have no effect in any run."""
        if not any(self.sparsities):
            for setting in OF_SPARSE:
                if given(self.settings, setting):
                    where = self.place("settings", *setting.split("."))
                    raise InputError(f"{where}: has no effect: every run is dense ({self.place('sparsities')})")
        found: list[Mapping[str, str]] = []
        base = replace(self.base(), on_idle=found.append)
        for name in self.parameterizations:
            for sparsity in self.sparsities:
                base.config(name, self.widths[0], sparsity, self.seeds[0])
        refuse_in_common([{key: line for key, line in idle.items() if given(self.settings, key)} for idle in found])
