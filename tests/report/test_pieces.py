"""Numbers in words, thinned curves and the records behind the report."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sparsae.core.intervals import Interval
from sparsae.report.looks import looks
from sparsae.report.markup import figures, paragraph, section
from sparsae.report.readable import compact, count, decimal, duration, percent, short_names, ticks
from sparsae.report.svg import POINTS, curve, logarithmic, numbered, thinned
from sparsae.report.tables import Table, interval_text

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


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 500.0, 1_000.0, 1_500.0], ["0", "500", "1k", "1.5k"]),
        ([5.25, 5.275, 5.3], ["5.250", "5.275", "5.300"]),
        ([1e6, 1.0005e6, 1.001e6], ["1M", "1.0005M", "1.001M"]),
        ([-0.0002, -0.0001, 0.0], ["−0.0002", "−0.0001", "0"]),
        ([1e-9, 2e-9], ["1e−9", "2e−9"]),
        ([], []),
        ([7.0], ["7"]),
    ],
)
def test_labels_of_an_axis(values: list[float], labels: list[str]) -> None:
    assert ticks(values) == labels


@given(st.integers(-10_000, 10_000), st.integers(1, 8), st.integers(-7, 9), st.sampled_from([1, 2, 2.5, 5]))
def test_labels_of_an_axis_are_the_numbers_where_they_stand(first: int, count: int, power: int, step: float) -> None:
    values = [(first + n) * step * 10.0**power for n in range(count + 1)]
    labels = [label.replace("−", "-") for label in ticks(values)]
    units = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    read = [float(label.rstrip("".join(units))) * units.get(label[-1], 1.0) for label in labels]
    assert read == pytest.approx(values, abs=0.011 * step * 10.0**power)
    assert len(set(labels)) == len(labels)


def test_labels_that_do_not_lie_evenly_have_their_own_digits() -> None:
    assert ticks([0.001, 0.01, 0.1, 1, 10], linear=False) == ["0.001", "0.01", "0.1", "1", "10"]
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(0.006, 25)
    logarithmic(axes.yaxis)
    assert axes.yaxis.get_major_formatter().format_ticks([0.01, 0.1, 1, 10]) == ["0.01", "0.1", "1", "10"]


def test_differences_have_their_sign_and_shares_are_percentages() -> None:
    assert ticks([-0.01, 0.0, 0.01], signed=True) == ["−0.01", "0", "+0.01"]
    axis = Figure().add_subplot().yaxis
    numbered(axis, percent=True)
    assert axis.get_major_formatter().format_ticks([0.2, 0.2025, 0.205]) == ["20.00%", "20.25%", "20.50%"]


@pytest.mark.parametrize(("low", "high", "at_least"), [(0.09, 0.3, 2), (1.0, 99.0, 3), (1e-6, 1e3, 3)])
def test_a_logarithmic_axis_has_more_than_one_label(low: float, high: float, at_least: int) -> None:
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    logarithmic(axes.yaxis)
    assert sum(low <= place <= high for place in axes.yaxis.get_majorticklocs()) >= at_least


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (3.45123, 0.01234, "3.4512 ± 0.0123"),
        (-0.00021, 0.00004, "−0.000210 ± 0.000040"),
        (0.0, 0.0, "0.0000 ± 0.0000"),
        (2.0, 1e-12, "2.0000 ± 0.0000"),
        (0.00003, 0.0037, "0.0000 ± 0.0037"),
    ],
)
def test_an_interval_has_digits_enough_for_itself(mean: float, half: float, text: str) -> None:
    assert interval_text(Interval(3, mean, mean - half, mean + half)) == text


def test_latex_gets_no_character_that_it_would_print_as_another() -> None:
    table = Table("p < 0.05, ≥ 2 × λ", ["a|b", "c"], [["α → β", "< 0.001"]])
    latex = table.latex()
    assert latex.isascii()
    assert r"p $<$ 0.05, $\geq$ 2 $\times$ $\lambda$" in latex
    assert r"a$\vert$b" in latex


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
