"""What a group of settings is, and the ranges that settings have."""

from __future__ import annotations

import sys
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparsae.config.complaints import Keys, Origin, Path, explain, located, nearest
from sparsae.errors import InputError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
TOLERANCE = 1e-9  # 1 - 0.9 is not 0.1 in floating point: shares this close are the same
LARGEST = 2**31 - 1  # what fits every counter below; torch multiplies sizes in 64 bits
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Text = Annotated[str, Field(min_length=1)]
# YAML has lists where these want tuples; their entries stay as strict as everything else.
Shares = Annotated[tuple[Share, Share], Field(strict=False)]
Counts = Annotated[tuple[Count, Count], Field(strict=False)]


def require_share_of_mean(value: object) -> None:
    """Raises ValueError for what is no (least, most) in terms of a mean, which has to be inside."""
    ends = value if isinstance(value, tuple | list) else ()
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not 0.0 <= numbers[0] <= 1.0 <= numbers[1] <= sys.float_info.max:
        raise ValueError(f"must be the least and the most in terms of the mean, such as [0.25, 4], not {value!r}")


def _validated_share_of_mean(value: Any) -> Any:
    require_share_of_mean(value)
    return value


# The least and the most of a quantity in terms of its mean.
ShareOfMean = Annotated[tuple[float, float], Field(strict=False), BeforeValidator(_validated_share_of_mean)]


def _listed(seeds: Any) -> Any:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if not 1 <= seeds <= 1000:
            raise ValueError(f"must be 1 to 1000 seeds, or a list of them, not {seeds}")
        return list(range(seeds))
    if not isinstance(seeds, list):
        raise ValueError(f"must be a list of seeds, or how many, not {seeds!r}")
    return seeds


# Beside a list of seeds: how many may stand in its place.
OrHowMany = BeforeValidator(_listed)


class Section(BaseModel):
    """A frozen group of settings; unknown keys, other types ("yes" for true, 1.0 for 1) and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    def __init__(self, **settings: Any) -> None:
        """Raises InputError, in one line, for the first that is wrong; `model_validate` raises ValidationError."""
        try:
            super().__init__(**settings)
        except ValidationError as errors:
            raise InputError(_complaint(type(self), errors)) from None

    # pydantic's mark of its own constructor: what it validates itself, such as a section in another, is made without.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field or an entry holds, or might hold null in place of; None for anything else."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    if get_origin(annotation) in (dict, list, tuple):
        return None
    return next((found for inner in get_args(annotation) if (found := section_in(inner)) is not None), None)


def _complaint(section: type[Section], errors: ValidationError) -> str:
    every = errors.errors(include_url=False)
    # A key that is misspelt may be the one that is missing.
    error = next((each for each in every if each["type"] == "extra_forbidden"), every[0])
    keys: Path = error["loc"]
    origins: dict[Keys, Origin] = {(): section.__name__}
    if error["type"] != "extra_forbidden":
        return explain(error, keys, origins)
    return f"{located(keys, origins)}: no such setting{near(section, keys)}"


def near(section: type[Section], keys: Path) -> str:
    """For the end of a line: the settings like one that is not there, or all beside it; empty where none are known."""
    around: type[Section] | None = section
    for key in keys[:-1]:
        if isinstance(key, int):
            continue  # of a list, whose entries are of the section that the list's key gave
        field = None if around is None else around.model_fields.get(key)
        annotation = None if field is None else field.annotation
        around = section_in(get_args(annotation)[0] if get_origin(annotation) is list else annotation)
    return "" if around is None else f"; {nearest(str(keys[-1]), around.model_fields)}"
