"""Numbers in words, thinned curves and the records behind the report."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sparsae.report.looks import looks
from sparsae.report.markup import figures, paragraph, section
from sparsae.report.readable import compact, count, decimal, duration, percent, short_names, tick
from sparsae.report.svg import POINTS, curve, thinned

NAN = math.nan


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (compact(8_175_471_177_728, "FLOP"), "8.18 TFLOP"),
        (compact(999_999, "B"), "1 MB"),
        (compact(0), "0"),
        (compact(-0.00052), "−0.00052"),
        (compact(2e-7), "2e-7".replace("-", "−")),
        (compact(NAN, "B"), "–"),
        (tick(1_500), "1.5k"),
        (decimal(4238.134), "4,238"),
        (decimal(86.654), "86.65"),
        (decimal(0.0), "0.000"),
        (decimal(math.inf), "–"),
        (count(314_573), "314,573"),
        (percent(0.9), "90 %"),
        (percent(-0.0512), "−5.12 %"),
        (duration(0.098), "0.098 s"),
        (duration(138.3), "2 min 18 s"),
        (duration(3_725), "1 h 2 min"),
        (duration(59.99), "60 s"),
        (duration(3e5), "3 days 11 h"),
        (duration(8.17424e7), "2 years 216 days"),
        (decimal(1.234e283), "1.23e283"),
    ],
)
def test_numbers_in_words(written: str, expected: str) -> None:
    assert written == expected


def test_names_lose_what_they_share_and_stay_apart() -> None:
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert list(short_names(names).values()) == ["0.attn.c_attn", "1.attn.c_attn"]
    assert short_names(["a.b"]) == {"a.b": "a.b"}
    assert short_names(["a", "a.b"]) == {"a": "a", "a.b": "a.b"}


@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=1, max_size=1500))
def test_thinned_curves_are_short_and_stay_within_their_points(values: list[float]) -> None:
    x, y = thinned(range(len(values)), values)
    assert len(x) == len(y) <= POINTS
    assert (np.diff(x) > 0).all()
    known = [v for v in values if not math.isnan(v)]
    assert np.isfinite(y).any() == bool(known)
    if known:
        assert min(known) - 1e-6 <= np.nanmin(y) <= np.nanmax(y) <= max(known) + 1e-6


def test_a_gap_stays_a_gap() -> None:
    _, y = thinned(range(POINTS * 2), [NAN] * POINTS + [1.0] * POINTS)
    assert np.isnan(y[: POINTS // 2]).all()
    assert (y[POINTS // 2 :] == 1.0).all()


@pytest.mark.parametrize(
    ("values", "marked"),
    [
        ([1.0, NAN, 2.0], "all"),
        ([1.0, NAN] * 40, 40),  # a teacher that is asked at every other row
        ([1.0, 2.0] * 40, 0),
        ([1.0, 2.0] * 40 + [NAN, 3.0, NAN], 1),
    ],
)
def test_points_that_nothing_is_joined_to_are_marked(values: list[float], marked: int | str) -> None:
    ax = Figure().add_subplot()
    curve(ax, range(len(values)), values, "accent")
    (line,) = ax.lines
    if marked == "all":
        assert (line.get_marker(), line.get_markevery()) == ("o", None)
    elif marked:
        assert line.get_marker() == "o"
        assert int(line.get_markevery().sum()) == marked
    else:
        assert line.get_marker() == "None"


def test_no_two_looks_are_the_same_and_a_mark_tells_them_apart() -> None:
    """A legend shows colour and mark, and no dashes."""
    found = looks([str(number) for number in range(64)])
    assert len({(look.colour, look.marker) for look in found.values()}) == 64
    assert len({(look.colour, look.symbol) for look in found.values()}) == 64


def test_a_section_of_nothing_is_not_there() -> None:
    assert section("a", "A", "What it says.") == section("a", "A", "What it says.", "", figures([None])) == ""
    assert "<h2" in section("a", "A", "What it says.", paragraph("said"))
