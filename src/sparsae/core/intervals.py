"""The mean of a few measurements, and how sure it is. Nothing that needs a spread is said of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of n values and its 95 % interval; None where there are too few values for one."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero; never so without an interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float]) -> Interval:
    """mean +- t(n - 1) s / sqrt(n), with s the sample deviation; no bounds for fewer than two values."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(n, mean, None, None)
    from scipy import stats

    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return Interval(n, mean, mean - half, mean + half)
