"""Records: what is written is read back, byte for byte the same; what is none is told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from sparsae.core.record import decode, encode, field_names, left_out_field, open_field
from sparsae.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: float
    whole: int
    inner: tuple[Inner, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    more: Mapping[str, float] = open_field()
    sure: bool
    perhaps: float | None
    rarely: int | None = left_out_field()
    side: Literal["left", "right"] = "left"
    by_name: Mapping[str, Inner]


OUTER: dict[str, Any] = {
    "name": "a", "other": 2, "another": None, "sure": True, "perhaps": None, "side": "right",
    "by_name": {"x": {"number": None, "whole": 3, "inner": [{"number": 1, "whole": 4, "inner": []}]}},
}  # fmt: skip


def test_a_record_is_written_as_it_was_read() -> None:
    outer = decode(Outer, OUTER, "here")
    assert outer.more.keys() == {"other", "another"}
    assert math.isnan(outer.more["another"])
    assert math.isnan(outer.by_name["x"].number)
    assert (outer.perhaps, outer.rarely, outer.side) == (None, None, "right")
    assert outer.by_name["x"].inner == (Inner(number=1, whole=4),)
    assert json.dumps(encode(outer)) == json.dumps(OUTER)
    assert encode(decode(Outer, OUTER | {"rarely": 5}, "here"))["rarely"] == 5
    assert field_names(Outer) == ("name", "sure", "perhaps", "rarely", "side", "by_name")


def test_infinities_and_keys_that_no_field_has_are_not_kept() -> None:
    assert encode(Inner(number=math.inf, whole=1)) == {"number": None, "whole": 1, "inner": []}
    assert decode(Inner, {"number": 2.5, "whole": 1, "else": 3}, "here") == Inner(number=2.5, whole=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "here: name: must be text, not 3;"),
        ({"sure": 1}, "here: sure: must be true or false, not 1;"),
        ({"perhaps": "x"}, "here: perhaps: must be a number or null, not 'x';"),
        ({"other": True}, "here: other: must be a number or null, not true;"),
        ({"rarely": 1.0}, "here: rarely: must be a whole number, not 1.0;"),
        ({"side": "up"}, "here: side: must be 'left' or 'right', not 'up';"),
        ({"by_name": []}, "here: by_name: must be an object, not [];"),
        ({"by_name": {"x": {"number": 1}}}, "here: by_name.x.whole: is missing;"),
        ({"by_name": {"x": {"number": 1, "whole": 1, "inner": [{"number": 1, "whole": True}]}}},
         "here: by_name.x.inner[0].whole: must be a whole number, not true;"),
    ],
)  # fmt: skip
def test_what_is_none_is_told_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        decode(Outer, OUTER | change, "here")
    assert str(caught.value) == f"{said} the file is damaged, or of another version of sparsae"


def test_what_is_no_object_is_told() -> None:
    with pytest.raises(InputError, match="here: must be an object, not 3"):
        decode(Outer, 3, "here")
    with pytest.raises(InputError, match="here: name: is missing"):
        decode(Outer, {}, "here")


def test_a_type_that_cannot_be_read_is_an_error_of_the_program() -> None:
    @dataclass(frozen=True)
    class Odd:
        when: set[int]

    with pytest.raises(TypeError, match="no record can have"):
        decode(Odd, {"when": []}, "here")
