"""How long something lasts: in steps, in shares of a run, or in epochs.

A setting writes it as a whole number of steps (`100`), as a percentage of the run (`5%`), or as passes over the
training data (`1 epoch`, `0.5 epochs`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from sparsae.config.section import LARGEST
from sparsae.errors import InputError

_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?%")
_EPOCHS = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?epochs?")


@dataclass(frozen=True)
class Horizon:
    """A run's length in optimizer steps, and the steps of an epoch where they are known."""

    steps: int
    epoch: int | None = None


def span_steps(span: int | str, horizon: Horizon) -> int:
    """A span in steps, at least 1. Raises InputError for epochs of a run whose epoch is not known."""
    if isinstance(span, int):
        return max(1, span)
    if found := _PERCENT.fullmatch(span):
        return max(1, math.floor(round(float(found[1]) / 100 * horizon.steps, 6)))
    found = _EPOCHS.fullmatch(span)
    if found is None:
        raise InputError(_wrong(span))
    if horizon.epoch is None:
        raise InputError(
            f"'{span}' is known only once the text is read, which --dry-run and compare do not, or from "
            "SparsifierConfig.steps_per_epoch in a loop of your own: give steps or a share of the run (5%)"
        )
    return max(1, round(float(found[1]) * horizon.epoch))


def _checked(span: Any) -> Any:
    if isinstance(span, str):
        found = _PERCENT.fullmatch(span) or _EPOCHS.fullmatch(span)
        if found is None or float(found[1]) <= 0 or (span.endswith("%") and float(found[1]) > 100):
            raise ValueError(_wrong(span))
        return span
    if isinstance(span, bool) or not isinstance(span, int) or span < 1:
        raise ValueError(_wrong(span))
    if span > LARGEST:
        raise ValueError(f"must be at most {LARGEST} steps, not {span}")
    return span


def _wrong(span: object) -> str:
    return f"must be a number of steps (100), a share of the run (5%) or epochs (1 epoch), not {span!r}"


Span = Annotated[int | str, BeforeValidator(_checked)]
