"""`density`: factors on what a budget gives each layer, by name pattern, role or depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from sparsae.families import FAMILIES

DEPTH = "depth"
# By a glob over layer names (in settings also a role) a factor; by `DEPTH` factors from the first block to the last.
DensityFactors = Mapping[str, float | Sequence[float]]

_LOWEST, _HIGHEST = 1e-6, 1e6


def require_factors(density: object) -> None:
    """Raises ValueError for what cannot be factors of densities."""
    if not isinstance(density, Mapping):
        raise ValueError(f"must map patterns to factors, such as {{'*.mlp.*': 0.8}}, not {density!r}")
    for key, value in density.items():
        if not isinstance(key, str):
            raise ValueError(f"a pattern must be text, not {key!r}")
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several != (key == DEPTH) or (several and not value):
            what = "a list of factors, from the first block to the last" if key == DEPTH else "one factor"
            raise ValueError(f"{key} must be {what}, not {value!r}")
        for factor in value if several else [value]:
            if not isinstance(factor, int | float) or isinstance(factor, bool) or not _LOWEST <= factor <= _HIGHEST:
                raise ValueError(f"{key}: a factor must be a number from {_LOWEST:g} to {_HIGHEST:g}, not {factor!r}")


def patterns_of(key: str) -> tuple[str, ...]:
    """The patterns that a role has in any family; of a pattern itself."""
    found = dict.fromkeys(family.densities[key] for family in FAMILIES.loaded() if key in family.densities)
    return tuple(found) or (key,)


def by_pattern(density: Mapping[str, float | list[float]], family: str) -> dict[str, float | list[float]]:
    """The same factors with patterns in the place of roles.

    Raises ValueError for what is neither a pattern (which has a `*`, `?`, `[` or dot) nor a role of the family.
    """
    found: dict[str, float | list[float]] = {}
    roles = FAMILIES[family].densities
    for key, value in density.items():
        pattern = roles.get(key, key)
        if key != DEPTH and pattern == key and not any(sign in key for sign in "*?[."):
            raise ValueError(
                f"{key} is no role of {family} ({', '.join(roles)}), nor {DEPTH}, nor a pattern such as *.mlp.*"
            )
        before = found.get(pattern, 1.0)
        found[pattern] = value * before if isinstance(value, int | float) and isinstance(before, float) else value
    return found


def _validated(density: Any) -> Any:
    require_factors(density)
    return density


Density = Annotated[dict[str, float | list[float]], BeforeValidator(_validated)]
