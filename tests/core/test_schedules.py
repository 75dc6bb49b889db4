"""Schedules: ends, bounds and monotone parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.span import Horizon
from sparsae.config.training import TrainingConfig
from sparsae.core.cadence import Cadence, Cubic, Never, Once, Periodic, decayed, rate_factor
from sparsae.rules.parts.several import AnyOf

shares = st.floats(0.0, 1.0)
kinds: st.SearchStrategy[Literal["constant", "linear", "cosine"]] = st.sampled_from(["constant", "linear", "cosine"])


def multipliers(steps: int, warmup: float, final: float) -> list[float]:
    return [rate_factor(step, steps, warmup, final) for step in range(steps)]


@given(st.integers(1, 300), shares, shares)
def test_warmup_rises_to_the_peak_and_never_starts_at_zero(steps: int, warmup: float, final: float) -> None:
    warm = round(warmup * steps)
    rising = multipliers(steps, warmup, final)[:warm]
    assert all(later > earlier for earlier, later in pairwise(rising))
    if warm:
        assert rising[0] == pytest.approx(1 / warm)
        assert rising[-1] == 1.0


@given(st.integers(1, 300), shares, shares)
def test_after_the_warmup_it_falls_from_the_peak_to_the_final_share(steps: int, warmup: float, final: float) -> None:
    falling = multipliers(steps, warmup, final)[round(warmup * steps) :]
    assert all(later <= earlier for earlier, later in pairwise(falling))
    assert all(final - 1e-12 <= value <= 1.0 + 1e-12 for value in falling)
    if len(falling) > 1:
        assert falling[0] == pytest.approx(1.0)
        assert falling[-1] == pytest.approx(final)


def test_the_middle_of_the_cosine_is_halfway_between_peak_and_final() -> None:
    # 10 steps of warm-up, then 11 steps: the sixth of them is the middle.
    assert rate_factor(15, 21, 10 / 21, 0.2) == pytest.approx(0.6)


def test_without_warmup_it_starts_at_the_peak_and_stays_at_the_final_share_past_the_end() -> None:
    assert rate_factor(0, 100, 0.0, 0.1) == 1.0
    assert rate_factor(500, 100, 0.0, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_a_schedule_falls_by_equal_steps_from_the_peak_to_the_final_share(schedule: Literal["linear", "wsd"]) -> None:
    rates = [rate_factor(step, 101, 10 / 101, 0.2, schedule, 50 / 101) for step in range(101)]
    falls = rates[{"linear": 10, "wsd": 50}[schedule] :]
    steps = [later - earlier for earlier, later in pairwise(falls)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert (falls[0], falls[-1]) == pytest.approx((1.0, 0.2))
    assert all(rate == 1.0 for rate in rates[10 : -len(falls)])


@given(st.integers(1, 300), shares, shares, shares)
def test_every_schedule_stays_between_its_ends(steps: int, warmup: float, final: float, decay: float) -> None:
    for schedule in get_args(TrainingConfig.model_fields["schedule"].annotation):
        rates = [rate_factor(step, steps, warmup, final, schedule, decay) for step in range(steps)]
        after = rates[round(warmup * steps) :]
        assert all(later <= earlier for earlier, later in pairwise(after))
        assert all(final - 1e-12 <= rate <= 1.0 + 1e-12 for rate in after)
        assert rates[: len(rates) - len(after)] == multipliers(steps, warmup, final)[: len(rates) - len(after)]
        if schedule == "constant":
            assert set(after) <= {1.0}


@given(kinds, shares, shares)
def test_decayed_is_bounded_and_does_not_rise(
    kind: Literal["constant", "linear", "cosine"], one: float, other: float
) -> None:
    early, late = sorted((one, other))
    assert 0.0 <= decayed(kind, late) <= decayed(kind, early) <= 1.0


def test_decayed_ends() -> None:
    assert [decayed(kind, 0.0) for kind in ("constant", "linear", "cosine")] == [1.0, 1.0, 1.0]
    assert [decayed(kind, 1.0) for kind in ("constant", "linear", "cosine")] == [1.0, 0.0, 0.0]
    assert [decayed(kind, 0.25) for kind in ("constant", "linear", "cosine")] == pytest.approx([1.0, 0.75, 0.8535534])


def test_decayed_names_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"'square'.*constant, linear or cosine"):
        decayed("square", 0.5)  # type: ignore[arg-type]


every = st.one_of(st.integers(1, 60), st.sampled_from(["0.1%", "2%", "30%", "1 epoch"]))
cadences: st.SearchStrategy[Cadence] = st.recursive(
    st.one_of(
        st.just(Never()),
        st.builds(Periodic, every, start=shares, stop=shares, at_stop=st.booleans()),
        st.builds(Once, shares),
        st.tuples(shares, shares).map(sorted).flatmap(lambda ends: st.builds(Cubic, *map(st.just, ends), every)),
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda several: AnyOf(tuple(several))),
    max_leaves=4,
)


@given(cadences, st.integers(1, 300))
def test_the_steps_of_a_cadence_are_those_at_which_it_is_due(cadence: Cadence, steps: int) -> None:
    horizon = Horizon(steps, epoch=20)
    asked = [step for step in range(1, steps + 1) if cadence.due(step, horizon)]
    assert list(cadence.steps(horizon)) == asked == list(Cadence.steps(cadence, horizon))
