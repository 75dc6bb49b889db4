"""How long something lasts: in steps, in shares of a run, or in epochs.

A setting writes it as a whole number of steps (`100`), as a percentage of the run (`5%`), or as passes over the
training data (`1 epoch`, `0.5 epochs`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any

from pydantic import BeforeValidator

from sparsae.config.complaints import shown
from sparsae.config.ranges import From
from sparsae.config.section import LARGEST
from sparsae.errors import InputError

_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?%")
_EPOCHS = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?epochs?")
_UPDATES = re.compile(r"([1-9]\d{0,3}) ?updates?")


@dataclass(frozen=True)
class Horizon:
    """A run's length in optimizer steps, and the steps of an epoch where they are known."""

    steps: int
    epoch: int | None = None


def span_steps(span: int | str, horizon: Horizon) -> int:
    """A span in steps, at least 1. Raises InputError for what is none, and for epochs where no epoch is known."""
    require_span(span)
    if isinstance(span, int):
        return max(1, span)
    if found := _PERCENT.fullmatch(span):
        return max(1, math.floor(round(float(found[1]) / 100 * horizon.steps, 6)))
    if horizon.epoch is None:
        raise InputError(
            f"'{span}' is known only once the text is read, or from SparsifierConfig.steps_per_epoch in a loop of your "
            "own: give steps or a share of the run (5%)"
        )
    return max(1, round(float(span.partition("e")[0]) * horizon.epoch))


def require_span(span: object) -> None:
    """Raises InputError for what is no span: a setting, or what a rule's own code gives."""
    if wrong := _wrong(span):
        raise InputError(wrong)


def require_share(**given: object) -> None:
    """Raises InputError for the first of these that is no number from 0 to 1."""
    for name, share in given.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= float(share) <= 1:
            raise InputError(f"{name}: must be a share of the whole, from 0 to 1 (0.75), not {shown(share)}")


def _validated(span: Any) -> Any:
    if wrong := _wrong(span):
        raise ValueError(wrong)
    return span


def _wrong(span: object) -> str | None:
    """What is wrong with a span; None: nothing."""
    if isinstance(span, str):
        percent, epochs = _PERCENT.fullmatch(span), _EPOCHS.fullmatch(span)
        found = percent or epochs
        if found and 0 < float(found[1]) <= (100 if percent else LARGEST):
            return None
    elif isinstance(span, int) and not isinstance(span, bool) and span >= 1:
        return None if span <= LARGEST else f"must be at most {LARGEST} steps"
    return (
        f"must be a number of steps (100), a share of the run (5%, at most 100%) or epochs (1 epoch), not {shown(span)}"
    )


Span = Annotated[int | str, BeforeValidator(_validated), From(1)]


def in_epochs(value: object) -> bool:
    """Whether a setting is a span in epochs, which are known once the text is read."""
    return isinstance(value, str) and _EPOCHS.fullmatch(value) is not None


def in_updates(span: int | str) -> int | None:
    """How many updates a ramp written so lasts; None: it is a span."""
    found = _UPDATES.fullmatch(span) if isinstance(span, str) else None
    return int(found[1]) if found else None


def _validated_ramp(span: Any) -> Any:
    if (isinstance(span, int) and not isinstance(span, bool) and span == 0) or in_updates(span) is not None:
        return span
    if wrong := _wrong(span):
        raise ValueError(wrong.replace("must be", "must be 0, a number of updates (2 updates),", 1))
    return span


RampSpan = Annotated[int | str, BeforeValidator(_validated_ramp), From(0)]
