"""Arguments of `sparsify` that cannot be what they are given as: one line with its name, for each of them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsae.core.heads import HeadLayout
from sparsae.errors import InputError
from sparsae.nn.arguments import CHECKS
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify, sparsify

ARGUMENTS = list(inspect.signature(sparsify).parameters)
MAY_BE_NONE = {"sparsity", "density", "fan_in", "fan_out", "heads", "initializer", "optimizer"}
HUGE = 10**400  # more than a float holds
MATRIX = torch.eye(8)  # shows itself on several lines
# By argument: what it cannot be, beside a thing that nothing can be.
WRONG: dict[str, list[Any]] = {
    "model": ["gpt2", nn.Linear],
    "sparsity": ["0.9", [0.9], True, math.nan, 1.0, -0.1, HUGE],
    "start": ["largest", {}, {"0": torch.ones(8, 8)}],
    "budget": ["rand", 1, np.array(["er", "erk"])],
    "unit": [4, (4, 0), (4, 4, 4), "4x4"],
    "min_density": [math.nan, "0.1", -0.1, 1.5, True, HUGE],
    "max_density": [math.nan, "0.1", -0.1, 1.5],
    "density": [0.5, {"*": math.nan}, {"*": "a"}, {5: 0.5}],
    "fan_in": [1, (2.0, 3.0), "ab", (0.5, HUGE)],
    "fan_out": [1, (math.nan, 2.0)],
    "include": ["*", [5], 5, [None]],
    "exclude": ["0", ["0", 5], b"0"],
    "sparsify_head": ["no", 1],
    "heads": [{"0": 5}, {"0": None}, ["0"]],
    "head_min_density": ["a", math.nan, 2],
    "initializer": ["normal", 0.02],
    "optimizer": ["adamw", torch.optim.AdamW],
    "backend": [5, ["auto"]],
    "seed": ["a", 0.5, True],
}
CASES = [(name, value) for name in ARGUMENTS for value in (*WRONG[name], object(), np.zeros((2, 8)), MATRIX)]


def test_every_argument_is_looked_at() -> None:
    assert list(CHECKS) == ARGUMENTS
    assert list(WRONG) == ARGUMENTS


@pytest.mark.parametrize(("name", "value"), CASES + [(name, None) for name in ARGUMENTS if name not in MAY_BE_NONE])
def test_what_cannot_be_is_one_line_with_the_arguments_name(name: str, value: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError) as caught:
        sparsify(**{"model": model, name: value})
    line = str(caught.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    assert not sparse_layers(model)


@pytest.mark.parametrize(("name", "value"), [("model", "gpt2"), ("optimizer", "adamw")])
def test_those_of_densify_too(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}: must be a torch"):
        densify(**{"model": nn.Sequential(nn.Linear(8, 8)), name: value})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (None, "NoneType"),
        (np.zeros((32, 1)), "ndarray"),
        (torch.zeros(3), r"torch\.float32 of \(3,\)"),
        (torch.zeros(32, dtype=torch.int64), r"torch\.int64 of \(32,\)"),
    ],
)
def test_what_an_initializer_gives_has_to_fit(values: Any, told: str) -> None:
    with pytest.raises(InputError, match=rf"^initializer: must give layer 0 .* values of \(32,\), not {told}$"):
        sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, initializer=lambda *_: values)


@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_a_model_on_the_meta_device_needs_an_initializer(start: Any) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match="layer 0 is on the meta device: its values need an initializer"):
        sparsify(model, 0.5, start=start)


def test_heads_that_do_not_divide_a_layer_are_told() -> None:
    with pytest.raises(InputError, match="heads of 3 features do not divide 8"):
        sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, heads={"0": HeadLayout("out", 3)}, head_min_density=0.1)


def test_errors_call_arguments_by_their_names() -> None:
    for arguments, line in (
        ({"exclude": ["hed"]}, "no layer matches 'hed' of exclude: names are such as 0"),
        (
            {"unit": (3, 3)},
            "unit 3x3 does not divide layer 0 of 8x8: choose one that does, or leave the layer out with ",
        ),
        ({"unit": (8, 8), "sparsity": 0.9}, "lower sparsity or choose a smaller unit"),
        ({"min_density": 0.9}, "widen min_density / max_density"),
        ({"backend": "none"}, "unknown backend 'none': use auto, "),
    ):
        with pytest.raises(InputError) as caught:
            sparsify(nn.Sequential(nn.Linear(8, 8)), **arguments)  # type: ignore[arg-type]
        assert line in str(caught.value)
        assert "sparsity." not in str(caught.value)
