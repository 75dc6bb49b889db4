"""What exists or not as one: a block of weights, or single weights of which N of every M in a row exist."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral
from reprlib import repr
from typing import Annotated, Any

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    GetPydanticSchema,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import CoreSchema, core_schema

from sparsae.config.section import Counts

_FORM = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")
SINGLE = (1, 1)


@dataclass(frozen=True)
class Quota:
    """N:M: of every `of` consecutive input features of a row exactly `active` weights exist."""

    active: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Quota:
        """Of "2:4". Raises ValueError for what is none."""
        found = _FORM.fullmatch(text)
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(f"must be rows and columns such as [4, 4], or N:M with N < M such as 2:4, not {text!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def density(self) -> float:
        """Share of the weights that exist."""
        return self.active / self.of

    @property
    def sparsity(self) -> float:
        """Share of the weights that do not."""
        return 1.0 - self.density

    def __str__(self) -> str:
        return f"{self.active}:{self.of}"


def parsed_unit(unit: object) -> tuple[tuple[int, int], Quota | None]:
    """Rows and columns of the block, and the quota of single weights, of (4, 4) or "2:4". Raises ValueError."""
    if isinstance(unit, Quota):
        return SINGLE, unit
    if isinstance(unit, str):
        return SINGLE, Quota.parse(unit)
    sides = unit if isinstance(unit, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and int(side) >= 1 for side in sides):
        raise ValueError(f"must be two whole numbers, rows and columns such as (4, 4), or '2:4', not {repr(unit)}")
    return (int(sides[0]), int(sides[1])), None


def unit_name(block: tuple[int, int], quota: Quota | None = None) -> str:
    """What people read: 1x1, 4x4, 2:4."""
    return f"{block[0]}x{block[1]}" if quota is None else str(quota)


def _validated(unit: Any, as_block: ValidatorFunctionWrapHandler) -> Any:
    return str(Quota.parse(unit)) if isinstance(unit, str) else as_block(unit)


def _schema(_: Any, schema_of: GetCoreSchemaHandler) -> CoreSchema:
    as_it_is = core_schema.plain_serializer_function_ser_schema(lambda unit: unit)
    return core_schema.no_info_wrap_validator_function(_validated, schema_of(Counts), serialization=as_it_is)


def _json_schema(_: Any, schema_of: GetJsonSchemaHandler) -> dict[str, Any]:
    block = schema_of(TypeAdapter(Counts).core_schema)
    return {"anyOf": [block, {"type": "string", "pattern": "^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$"}]}


# In settings: [4, 4] or 2:4. Whoever gives neither is told what is wrong with the block, or with the text.
Unit = Annotated[tuple[int, int] | str, GetPydanticSchema(_schema, _json_schema)]
