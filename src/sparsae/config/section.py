"""What a group of settings is, and the ranges that settings have."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
    if len(ends) != 2 or len(numbers) != 2 or not 0.0 <= numbers[0] <= 1.0 <= numbers[1] < math.inf:
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
    return seeds


# Beside a list of seeds: how many may stand in its place.
OrHowMany = BeforeValidator(_listed)


class Section(BaseModel):
    """A frozen group of settings; unknown keys, other types ("yes" for true, 1.0 for 1) and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
