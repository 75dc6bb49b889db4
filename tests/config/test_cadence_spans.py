"""Spans that are none are refused in the same words wherever they are given: a setting, or a rule's own code."""

from __future__ import annotations

from typing import Any

import pytest

from sparsae.config.load import resolve
from sparsae.config.span import Horizon, span_steps
from sparsae.core.cadence import Cubic, Periodic
from sparsae.errors import InputError
from sparsae.rules import RiglConfig

WRONG = [
    *(0, -3, 2.5, 2**31, None, True, [5]),
    *("", "5", "0%", "0.0 %", "500%", "100.1%", "-5%", "0 epochs", "often", "9" * 400 + " epochs", "9" * 400 + "%"),
]


@pytest.mark.parametrize("span", WRONG)
def test_what_is_no_span_is_refused_alike_everywhere(span: Any) -> None:
    with pytest.raises(InputError) as caught:
        span_steps(span, Horizon(100, epoch=10))
    message = str(caught.value)
    assert message.startswith("must be ")
    assert len(message) < 200
    for build in (lambda: Periodic(span), lambda: Cubic(0.1, 0.5, span)):
        with pytest.raises(InputError) as caught:
            build()
        assert str(caught.value) == message
    with pytest.raises(InputError, match="RiglConfig: every: must be") as wrong:
        RiglConfig(every=span)
    assert message in str(wrong.value)


def test_a_setting_of_400_digits_is_told_with_its_key() -> None:
    with pytest.raises(InputError, match=r"--set: topology\.every: must be a number of steps"):
        resolve(None, None, "rigl", [f"topology.every={'9' * 400} epochs"])


@pytest.mark.parametrize(("span", "steps"), [(7, 7), ("100%", 100), (".5 epochs", 5), ("2 epoch", 20), ("0.001%", 1)])
def test_spans_in_steps(span: int | str, steps: int) -> None:
    assert span_steps(span, Horizon(100, epoch=10)) == steps
    assert Periodic(span).every == span


@pytest.mark.parametrize(("span", "steps", "every"), [("2%", 40, 10), ("2%", 1000, 20), ("50%", 40, 20), (3, 40, 3)])
def test_of_a_share_of_a_run_at_least_ten_steps_lie_between_updates(span: int | str, steps: int, every: int) -> None:
    horizon = Horizon(steps)
    due = [step for step in range(1, steps + 1) if Periodic(span).due(step, horizon)]
    assert due == list(range(every, steps, every))
    assert Periodic(span).interval(horizon) == every
    pruning, pruned = Cubic(0.0, 1.0, span), sorted({*due, steps - 1})
    assert [step for step in range(1, steps + 1) if pruning.due(step, horizon)] == pruned
    assert list(pruning.steps(horizon)) == pruned


def test_the_rules_of_a_short_comparison_update_at_the_same_steps() -> None:
    from sparsae.experiments.compare.plan import ComparisonPlan
    from sparsae.experiments.plan import parse_plan
    from sparsae.rules import build_rule

    names = ["sparsae", "set", "set-ramp", "rigl", "gse"]
    plan = parse_plan({"methods": names, "settings": {"training": {"steps": 100}}}, "here", ComparisonPlan)
    dues = set()
    for name in names:
        rule = build_rule(plan.config(name, 0.9, 0).topology)
        assert rule.ramp_steps(Horizon(100)) == (10 if name in ("sparsae", "set-ramp") else 0)
        dues.add(tuple(step for step in range(1, 56) if rule.when.due(step, Horizon(100))))
    assert dues == {tuple(range(10, 56, 10))}
