"""One run's settings at a width, a sparsity and under a parameterization: what is varied where settings shall transfer.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sparsae.config import Config, ModelConfig
from sparsae.config.complaints import nearest
from sparsae.config.load import has_sparsity, resolve
from sparsae.errors import InputError

Tree = Mapping[str, Any]
Heads = Literal["scaled", "constant"]

# By name: the parameterization, and what its initial variances are divided by. SP and µP as they are published know
# nothing of density; "-active" corrects their initial values, and only those, for it.
PARAMETERIZATIONS: Mapping[str, tuple[str, str]] = {
    "sp": ("sp", "dense"),
    "sp-active": ("sp", "active"),
    "mup": ("mup", "dense"),
    "mup-active": ("mup", "active"),
    "supar": ("supar", "active"),
}

# Settings that a grid gives to every run, and by which of its lists.
SAID: Mapping[str, str] = {
    "seed": "seeds",
    "model.width": "widths",
    "sparsity.sparsity": "sparsities",
    "parameterization.name": "parameterizations",
    "parameterization.initial_fan_in": "parameterizations",
}


@dataclass(frozen=True)
class Base:
    """What all runs of a grid have in common.

    heads: "scaled", as many as keep the size that they have in the settings, or "constant", the settings' number of
    them at every width. trees: settings in the form of files, later ones winning, each with its origin.
    """

    preset: str
    method: str
    heads: Heads
    trees: Sequence[tuple[Tree, str]]

    def config(
        self, parameterization: str, width: int, sparsity: float, seed: int, **more: tuple[str, object]
    ) -> Config:
        """The settings of one run; sparsity 0 is the method `dense`. `more`: origin -> (key, value).

        Raises InputError for settings that are wrong, or a width that the heads or an MLP cannot follow.
        """
        name, fan_in = PARAMETERIZATIONS[parameterization]
        given: dict[str, tuple[str, object]] = {
            "seeds": ("seed", seed),
            "parameterizations": ("parameterization.name", name),
            "initial variances": ("parameterization.initial_fan_in", fan_in),
        }
        method, trees = self.method, self.trees
        if sparsity > 0:
            given["sparsities"] = ("sparsity.sparsity", sparsity)
        else:
            # The rule's settings say nothing of a model whose connections all exist.
            method, trees = "dense", [({k: v for k, v in tree.items() if k != "topology"}, at) for tree, at in trees]
        given |= {f"width {width}: {key}": (f"model.{key}", value) for key, value in self._of_width(width).items()}
        return resolve(None, self.preset, method, options={**given, **more}, trees=trees)

    @cached_property
    def _model(self) -> ModelConfig:
        return resolve(None, self.preset, self.method, trees=self.trees).model

    def _of_width(self, width: int) -> dict[str, int]:
        """The keys of the section `model` that follow the width."""
        model = self._model
        found = {"width": width}
        if self.heads == "scaled":
            found["heads"] = _scaled("heads", model.heads, width, model.width)
            if model.kv_heads is not None:
                found["kv_heads"] = _scaled("kv_heads", model.kv_heads, width, model.width)
        if model.mlp_width is not None:
            found["mlp_width"] = _scaled("mlp_width", model.mlp_width, width, model.width)
        return found


def _scaled(name: str, value: int, width: int, base: int) -> int:
    if value * width % base:
        raise InputError(
            f"widths: {width}: model.{name} would be {value * width / base:g}, being {value} at width {base}: give "
            "widths that keep it whole, or set it otherwise"
        )
    return value * width // base


def check_names(names: Sequence[str], method: str) -> None:
    """ValueError for a parameterization that does not exist, or a method without a sparsity of its own."""
    for name in names:
        if name not in PARAMETERIZATIONS:
            raise ValueError(f"parameterizations: no '{name}'; {nearest(name, PARAMETERIZATIONS)}")
    if not has_sparsity(method) or method == "dense_small":
        raise ValueError(f"method: '{method}' has no sparsity to vary; its models are those of sparsity 0")
