"""What the arguments of `sparsify` and `densify` have to be, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from reprlib import repr
from typing import Any

import torch
from torch import nn

from sparsae.config.density import require_factors
from sparsae.config.section import require_share_of_mean
from sparsae.config.unit import parsed_unit
from sparsae.core.budgets import BUDGETS
from sparsae.core.heads import HeadLayout
from sparsae.errors import InputError
from sparsae.nn.start import require_start

Check = Callable[[Any], object]  # raises ValueError


def require_arguments(**given: object) -> None:
    """Raises InputError for the first of these arguments, by name, that cannot be what it is given as."""
    for name, value in given.items():
        try:
            CHECKS[name](value)
        except ValueError as error:
            line = " ".join(str(error).split())  # a tensor shows itself on several
            raise InputError(f"{name}: {line}") from None


def _must_be(what: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any) -> None:
        if not fits(value):
            raise ValueError(f"must be {what}, not {repr(value)}")

    return check


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # NaN is in no range


def _are_patterns(value: Any) -> bool:
    return (
        isinstance(value, Collection) and not isinstance(value, str | bytes) and all(isinstance(v, str) for v in value)
    )


def _are_layouts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(layout, HeadLayout) for layout in value.values())


_share = _must_be("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_patterns = _must_be("a list of globs over names of modules, such as ['*.attn']", _are_patterns)
_fan = _or_none(require_share_of_mean)

CHECKS: Mapping[str, Check] = {
    "model": _must_be("a torch.nn.Module", lambda value: isinstance(value, nn.Module)),
    "sparsity": _or_none(_must_be("a number such as 0.9, from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1)),
    "start": require_start,
    "budget": _must_be(f"one of {', '.join(BUDGETS)}", lambda value: isinstance(value, str) and value in BUDGETS),
    "unit": parsed_unit,
    "min_density": _share,
    "max_density": _share,
    "density": _or_none(require_factors),
    "fan_in": _fan,
    "fan_out": _fan,
    "include": _patterns,
    "exclude": _patterns,
    "sparsify_head": _must_be("True or False", lambda value: isinstance(value, bool)),
    "heads": _or_none(_must_be('HeadLayout("out" or "in", features of a head) by names of layers', _are_layouts)),
    "head_min_density": _share,
    "initializer": _or_none(_must_be("a function of (name, topology, generator)", callable)),
    "optimizer": _or_none(_must_be("a torch optimizer", lambda value: isinstance(value, torch.optim.Optimizer))),
    "backend": _must_be("the name of one, or auto", lambda value: isinstance(value, str)),
    "seed": _must_be("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
}
