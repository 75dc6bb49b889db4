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
    with pytest.raises(ValueError, match="must be") as wrong:
        RiglConfig(every=span)
    assert message in str(wrong.value)


def test_a_setting_of_400_digits_is_told_with_its_key() -> None:
    with pytest.raises(InputError, match=r"--set: topology\.every: must be a number of steps"):
        resolve(None, None, "rigl", [f"topology.every={'9' * 400} epochs"])


@pytest.mark.parametrize(("span", "steps"), [(7, 7), ("100%", 100), (".5 epochs", 5), ("2 epoch", 20), ("0.001%", 1)])
def test_spans_in_steps(span: int | str, steps: int) -> None:
    assert span_steps(span, Horizon(100, epoch=10)) == steps
    assert Periodic(span).every == span
