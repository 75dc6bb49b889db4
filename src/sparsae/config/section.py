"""What a group of settings is, and the ranges that settings have."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
LARGEST = 2**31 - 1  # what fits every counter below; torch multiplies sizes in 64 bits
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Text = Annotated[str, Field(min_length=1)]
# YAML has lists where these want tuples; their entries stay as strict as everything else.
Shares = Annotated[tuple[Share, Share], Field(strict=False)]
Counts = Annotated[tuple[Count, Count], Field(strict=False)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys, other types ("yes" for true, 1.0 for 1) and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
