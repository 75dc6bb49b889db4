"""Intervals and tests against numbers worked by hand and against scipy's own; what must not be said of few seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.core.intervals import mean_interval
from sparsae.experiments.compare.record import CurvePoint, Paired, Row
from sparsae.experiments.compare.summary import conclusions, contrasts, judged_by, summarize, warnings
from sparsae.experiments.compare.tables import contrast_table
from sparsae.experiments.statistics import (
    Equivalent,
    equivalent_tokens,
    holm,
    paired_difference,
    winner,
)
from tests.support.results import compare_results, compare_row

losses = st.floats(0.5, 10.0, allow_nan=False).map(lambda x: round(x, 4))


def test_the_interval_of_three_values_by_hand() -> None:
    # 1, 2, 3: mean 2, s = 1, s / sqrt(3) = 0.57735, t(2) at 97.5 % = 4.30265.
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.n, interval.mean) == (3, 2.0)
    assert interval.high == pytest.approx(2 + 4.30265273 * 0.57735027)
    assert interval.low == pytest.approx(2 - 4.30265273 * 0.57735027)


def test_one_value_has_no_interval() -> None:
    interval = mean_interval([1.5])
    assert (interval.mean, interval.low, interval.high) == (1.5, None, None)
    assert not interval.excludes_zero


def test_the_paired_test_by_hand() -> None:
    # Differences -1, -2, -3: t = -2 / (1 / sqrt(3)) = -3.4641, two-sided p with 2 degrees of freedom = 0.0742.
    difference = paired_difference({1: 4.0, 2: 3.0, 3: 2.0}, {1: 5.0, 2: 5.0, 3: 5.0, 4: 9.0})
    assert difference is not None
    assert difference.t == pytest.approx(-math.sqrt(12))
    assert difference.p == pytest.approx(0.0741799, abs=1e-6)
    assert difference.verdict == "undecided"  # a mean of -2 with an interval of -4.48 to 0.48


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=8))
def test_intervals_and_tests_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    assume(np.ptp(a - b) > 1e-6)
    difference = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b)
    bounds = expected.confidence_interval(0.95)
    assert difference is not None
    assert difference.t == pytest.approx(expected.statistic, rel=1e-6, abs=1e-9)
    assert difference.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (difference.interval.low, difference.interval.high) == pytest.approx((bounds.low, bounds.high), abs=1e-9)
    assert (difference.verdict == "undecided") == (bounds.low <= 0 <= bounds.high)


def test_equal_differences_leave_no_doubt() -> None:
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    less = paired_difference({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5})
    assert same is not None
    assert less is not None
    assert (same.p, same.verdict) == (1.0, "undecided")
    assert (less.p, less.verdict) == (0.0, "better")


def test_without_a_shared_seed_nothing_is_paired() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04, the last raised to the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


class TestWinner:
    def test_is_better_than_every_other(self) -> None:
        runs = {"a": {0: 1.0, 1: 1.1, 2: 1.2}, "b": {0: 2.0, 1: 2.1, 2: 2.2}, "c": {0: 3.0, 1: 3.2, 2: 3.1}}
        assert winner(runs) == "a"

    def test_there_is_none_where_the_interval_crosses_zero(self) -> None:
        runs = {"a": {0: 1.0, 1: 1.1, 2: 1.2}, "b": {0: 1.9, 1: 1.0, 2: 1.4}}
        assert np.mean(list(runs["a"].values())) < np.mean(list(runs["b"].values()))
        assert winner(runs) is None

    def test_there_is_none_with_one_seed(self) -> None:
        assert winner({"a": {0: 1.0}, "b": {0: 9.0}}) is None

    def test_there_is_none_without_a_rival(self) -> None:
        assert winner({"a": {0: 1.0, 1: 1.0}}) is None


class TestEquivalentTokens:
    # A curve that falls as a power law exactly: 2 + 3 (tokens / 1000)^-0.5.
    curve = tuple((t * 100.0, 2 + 3 * (t / 10) ** -0.5) for t in range(1, 11))

    def test_the_same_loss_needs_the_same_tokens(self) -> None:
        assert equivalent_tokens(self.curve, 0.0).ratio == pytest.approx(1.0)

    def test_a_lower_loss_needs_what_the_power_law_says(self) -> None:
        # 2 + 3 r^-0.5 = 4 at r = 2.25.
        found = equivalent_tokens(self.curve, -1.0)
        assert found.how == "power law"
        assert found.ratio == pytest.approx(2.25, rel=0.05)

    def test_a_higher_loss_lies_on_the_curve(self) -> None:
        # At half the tokens the loss is 2 + 3 sqrt(2).
        found = equivalent_tokens(self.curve, 3 * math.sqrt(2) - 3)
        assert found.how == "interpolation"
        assert found.ratio == pytest.approx(0.5)

    def test_nothing_is_said_of_what_the_curve_cannot_tell(self) -> None:
        assert equivalent_tokens(self.curve, -3.5).ratio is None  # below the asymptote
        assert equivalent_tokens(self.curve, -2.5).ratio is None  # 36 times the tokens
        assert equivalent_tokens(self.curve, 50.0).ratio is None  # above the first validation
        assert equivalent_tokens(self.curve[-3:], -0.1) == Equivalent(
            None, "fewer than five validations of the reference"
        )
        rising = [(t, -loss) for t, loss in self.curve]
        assert equivalent_tokens([(t, 9 + loss) for t, loss in rising], -0.1).ratio is None


def row(method: str, seed: int, loss: float, diverged: bool = False, **more: Any) -> Row:
    row = compare_row(method, seed, loss, diverged, test_loss=None if diverged else loss + 0.5 * seed)
    return replace(row, **more)


def test_methods_are_judged_by_the_test_where_every_run_has_one() -> None:
    rows = [row("static", n, 3.0) for n in range(3)] + [row("set", n, 3.0, test_loss=2.0) for n in range(3)]
    assert judged_by([*rows, row("rigl", 0, 0.0, diverged=True)]) == "test_loss"
    changed = summarize(rows, "static", "test_loss")[1]
    # 2.0 less 3.0, 3.5 and 4.0, where validation says that nothing differs.
    assert changed.difference
    assert changed.test_loss
    assert changed.validation_loss
    assert changed.difference.mean == pytest.approx(-1.5)
    assert changed.test_loss.mean == 2.0
    assert changed.validation_loss.mean == 3.0
    assert conclusions(rows, "test_loss")[0].winner == "set"
    assert conclusions(rows, "validation_loss")[0].winner is None
    earlier = [*rows, row("set", 3, 3.0, test_loss=None)]  # a run of the version before, or a short text
    assert judged_by(earlier) == "validation_loss"
    told = warnings(compare_results(earlier, judged_by="validation_loss"), {})
    assert "text on which learning rates were tuned" in told[0]


def test_the_summary_pairs_by_seed_and_leaves_diverged_runs_out() -> None:
    rows = [row("static", n, 3.0 + n) for n in range(3)] + [row("set", n, 2.0 + n + 0.1 * n) for n in range(3)]
    rows += [row("rigl", 0, 1.0), row("rigl", 1, 2.0), row("rigl", 2, 0.0, diverged=True)]
    static, changed, partial = summarize(rows, "static", "validation_loss")
    assert (static.verdict, static.difference) == ("reference", None)
    assert changed.difference
    assert changed.difference.mean == pytest.approx(-0.9)
    assert changed.verdict == "better"
    assert partial.diverged == 1
    assert partial.difference
    assert partial.difference.n == 2
    assert partial.difference.mean == pytest.approx(-2.0)
    (concluded,) = conclusions(rows, "validation_loss")
    assert (concluded.sparsity, concluded.winner) == (0.9, None)  # the better one diverged once


def test_a_run_of_another_sparsity_than_it_says_is_told() -> None:
    rows = [row("static", n, 3.0, nnz=100, nnz_target=100) for n in range(2)]
    rows += [row("pruner", n, 2.9, nnz=100 + 300 * n, nnz_target=100) for n in range(2)]
    (said,) = warnings(compare_results(rows), {})
    assert said.startswith("pruner at sparsity 0.9, seed 1: ended with 400 connections where that sparsity has 100")


def test_a_method_that_moved_nothing_is_named_once() -> None:
    idle = {"updates": 0, "steps": 40, "rule": "rigl", "moves": True}
    rows = [row("static", n, 3.0, rule="static", moves=False, updates=0) for n in range(2)]
    rows += [row("set", n, 3.1, rule="set", moves=True, updates=5) for n in range(2)]
    rows += [row("rigl", n, 3.2, **idle) for n in range(2)] + [row("gse", 0, 0.0, diverged=True)]
    rows += [row("mest", n, 3.3, **{**idle, "updates": 4}) for n in range(2)]
    assert warnings(compare_results(rows), {}) == [
        "gse at sparsity 0.9: diverged (seed 0)",
        "rigl at sparsity 0.9: no topology update in 40 steps, so it was static (train longer, or set "
        "topology.every or the plan's cadence lower)",
        "mest at sparsity 0.9: 4 topology updates in 40 steps, too few to call it a moving topology (train "
        "longer, or set topology.every or the plan's cadence lower)",
    ]


class TestEqualRuns:
    def of(self, method: str, *losses: float, seconds: float = 0.0, **more: Any) -> list[Row]:
        curve = tuple(
            CurvePoint(step=step, tokens=0, train_flops=0, seconds=seconds, loss=loss)
            for step, loss in enumerate(losses)
        )
        return [row(method, n, losses[-1] + n, curve=curve, seconds=seconds, **more) for n in range(2)]

    def told(self, rows: list[Row], **settings: Config) -> list[str]:
        return warnings(compare_results(rows), {entry.run: settings[entry.method] for entry in rows})

    def test_methods_that_the_plan_makes_equal_are_named_once(self) -> None:
        rows = self.of("static", 4.0, 3.0) + self.of("erk", 4.0, 3.0, seconds=2.0, peak_memory_bytes=9)
        # By these settings all that differs is the name; a share of no teacher has no effect.
        densities = ["sparsity.budget=erk", "sparsity.min_density=0.0", "sparsity.max_density=1.0"]
        static = resolve(method="static", overrides=densities)
        erk = resolve(method="static-erk", overrides=["teacher.share=0.5"])
        assert static.method != erk.method
        assert self.told(rows, static=static, erk=erk) == [
            "static and erk at sparsity 0.9 are the same run: the plan's settings make them equal"
        ]

    def test_runs_of_other_settings_are_not_called_the_same(self) -> None:
        rows = self.of("static", 4.0, 3.0) + self.of("kept", 4.0, 3.0)
        other = resolve(method="static", overrides=["training.mlp_keeps=float32"])
        assert self.told(rows, static=resolve(method="static"), kept=other) == [
            "static and kept at sparsity 0.9 gave the same results: what their settings differ by changed nothing in "
            "these runs"
        ]

    def test_of_many_that_gave_the_same_those_that_are_one_run_are_told(self) -> None:
        rows = [entry for name in ("static", "again", "kept") for entry in self.of(name, 4.0, 3.0)]
        static, kept = (resolve(method="static", overrides=more) for more in ([], ["training.mlp_keeps=float32"]))
        first, second = self.told(rows, static=static, again=static, kept=kept)
        assert first.startswith("static and again at sparsity 0.9 are the same run")
        assert second.startswith("static and kept at sparsity 0.9 gave the same results")

    @pytest.mark.parametrize("more", [{"test_loss": 2.0}, {"study_flops": 5}, {"updates": 7, "moves": False}])
    def test_runs_of_other_results_are_not_named(self, more: dict[str, Any]) -> None:
        rows = self.of("static", 4.0, 3.0) + self.of("set", 4.0, 3.0, **more)
        assert self.told(rows, static=resolve(method="static"), set=resolve(method="set")) == []
        assert warnings(compare_results(self.of("static", 4.0, 3.0) + self.of("set", 4.0, 2.9)), {}) == []


def contrasted(seeds: int, **losses: list[float]) -> list[Row]:
    """Rows of the given test losses, seed by seed."""
    return [row(name, n, 3.0, test_loss=values[n]) for name, values in losses.items() for n in range(seeds)]


class TestAdjustment:
    """Paired differences from `static` of -0.1, -0.2, -0.3: p = 0.0742; of -0.10, -0.11, -0.12: p = 0.0027."""

    rows = contrasted(
        3, static=[3.0, 3.0, 3.0], good=[2.9, 2.89, 2.88], vague=[2.9, 2.8, 2.7], fair=[2.95, 2.93, 2.94],
        better=[2.95, 2.94, 2.91],
    )  # fmt: skip

    def by_name(self, planned: list[tuple[str, str]]) -> dict[str, tuple[Paired, str]]:
        """Difference and verdict of each method but the reference."""
        found = summarize(self.rows, "static", "test_loss", planned)
        return {entry.method: (entry.difference, entry.verdict) for entry in found if entry.difference}

    def test_stars_are_of_adjusted_p_values(self) -> None:
        found = self.by_name([])
        p = {name: difference.p or 0.0 for name, (difference, _) in found.items()}
        assert {name: difference.p_holm for name, (difference, _) in found.items()} == dict(
            zip(p, holm(list(p.values())), strict=True)
        )
        # The interval of `better` excludes zero, which of four differences is not enough.
        better, verdict = found["better"]
        assert better.high is not None
        assert better.p_holm is not None
        assert better.high < 0 < p["better"] < 0.05 < better.p_holm
        assert verdict == "undecided"
        assert found["good"][1] == "better"

    def test_a_planned_contrast_stands_by_itself_and_makes_the_others_fewer(self) -> None:
        alone, together = self.by_name([("better", "static"), ("static", "vague")]), self.by_name([])
        assert alone["better"][1] == "better"
        assert alone["better"][0].p_holm is None
        assert (alone["good"][0].p_holm or 0.0) < (together["good"][0].p_holm or 0.0)

    def test_the_family_is_of_all_sparsities(self) -> None:
        other = [replace(entry, sparsity=0.95) for entry in self.rows]
        both = [e.difference for e in summarize([*self.rows, *other], "static", "test_loss") if e.difference]
        p = [difference.p or 0.0 for difference in both]
        assert [difference.p_holm for difference in both] == holm(p)
        assert len(p) == 8

    def test_rows_under_a_further_match_are_a_family_of_their_own(self) -> None:
        named = self.by_name([])
        others = self.rows[3:]
        same = [replace(entry, method=f"{entry.method}@steps", beside=True) for entry in others]
        other = [replace(entry, method="good@tokens", beside=True, match="tokens") for entry in others[:3]]
        entries = summarize([*self.rows, *same, *other], "static", "test_loss")
        found = {entry.method: entry.difference for entry in entries if entry.difference}
        for method, (difference, _) in named.items():
            assert found[method] == found[f"{method}@steps"] == difference
        alone = found["good@tokens"]
        assert alone.p_holm == alone.p

    def test_contrasts_need_no_reference(self) -> None:
        (entry,) = contrasts(self.rows, "test_loss", [("good", "fair")])
        assert (entry.a, entry.b, entry.verdict) == ("good", "fair", "better")
        assert entry.difference
        assert entry.difference.mean == pytest.approx(2.89 - 2.94)
        table = contrast_table(compare_results(self.rows, contrasts=(entry,)))
        assert table.rows[0][:3] == ["90 %", "good less fair", "3"]
        assert "±" in table.rows[0][3]


def test_rows_under_a_further_match_win_nothing_and_stop_no_winner() -> None:
    rows = contrasted(2, static=[3.0, 3.0], good=[2.0, 2.0])
    beside = [replace(entry, method="good@steps", beside=True) for entry in rows if entry.method == "good"]
    assert conclusions([*rows, *beside], "test_loss")[0].winner == "good"


class TestDiverged:
    """A method of which a run diverged is neither better nor worse: what is left of it is no fair sample."""

    def of(self, method: str, loss: float, *lost: int) -> list[Row]:
        return [row(method, n, loss + 0.001 * (n % 2), diverged=n in lost) for n in range(5)]

    def test_neither_side_of_a_difference_may_have_diverged(self) -> None:
        planned = [("good", "static")]
        for rows in (
            [*self.of("static", 3.5), *self.of("good", 3.4, 2, 3)],
            [*self.of("static", 3.5, 2, 3), *self.of("good", 3.4)],
        ):
            entries = {entry.method: entry for entry in summarize(rows, "static", "validation_loss", planned)}
            assert entries["good"].difference is not None
            assert entries["good"].difference.n == 3
            assert entries["good"].verdict == "undecided"
            (contrast,) = contrasts(rows, "validation_loss", planned)
            assert contrast.difference is not None
            assert contrast.verdict == "undecided"

    def test_nothing_is_better_than_every_other_where_one_diverged(self) -> None:
        rows = [*self.of("static", 3.5), *self.of("good", 3.4)]
        assert conclusions(rows, "validation_loss")[0].winner == "good"
        assert conclusions([*rows, *self.of("lost", 3.0, *range(5))], "validation_loss")[0].winner is None
        beside = [replace(entry, beside=True) for entry in self.of("lost@tokens", 3.0, 0)]
        assert conclusions([*rows, *beside], "validation_loss")[0].winner == "good"
