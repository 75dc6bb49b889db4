"""What can be said of a few seeds: intervals, paired differences, and what a difference is worth in tokens.

Intervals are two-sided 95 % intervals of Student's t distribution. Nothing that needs a spread is said of one seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy import optimize, stats

from sparsae.core.intervals import CONFIDENCE, Interval, mean_interval

Verdict = Literal["reference", "better", "worse", "undecided"]

_FARTHEST = 8.0  # times the reference's tokens: beyond, a power law fitted to its curve says nothing
_SETTLED = 0.2  # share of the curve, from its beginning, that is left out of the fit: warm-up
_RESIDUAL = 0.05  # of the fitted curve's drop; a worse fit is no power law


@dataclass(frozen=True)
class Difference:
    """Paired differences, value less reference: their interval, and the paired t test of a mean of zero."""

    interval: Interval
    t: float | None
    p: float | None

    @property
    def verdict(self) -> Verdict:
        """For losses: better is below the reference; undecided wherever the interval touches zero."""
        if not self.interval.excludes_zero:
            return "undecided"
        return "better" if self.interval.mean < 0 else "worse"


@dataclass(frozen=True)
class Equivalent:
    """Tokens at which the reference has a loss, as a multiple of those it was given; None with the reason why not."""

    ratio: float | None
    how: str


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The differences over the seeds that both have; None where there is no such seed."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    interval = mean_interval(differences)
    if interval.high is None:
        return Difference(interval, None, None)
    half = interval.high - interval.mean
    if half == 0.0:  # all differences are the same
        return Difference(interval, None, 1.0 if interval.mean == 0 else 0.0)
    t = interval.mean / half * float(stats.t.ppf(0.5 + CONFIDENCE / 2, interval.n - 1))
    return Difference(interval, t, float(2 * stats.t.sf(abs(t), interval.n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p values for so many tests at once: sorted, (m - rank) p, made monotone, at most 1."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def winner(losses: Mapping[str, Mapping[int, float]]) -> str | None:
    """The method whose paired interval against every other excludes zero, its loss being the lower one; else None."""
    for name, values in losses.items():
        others = [paired_difference(values, other) for key, other in losses.items() if key != name]
        if others and all(difference is not None and difference.verdict == "better" for difference in others):
            return name
    return None


def equivalent_tokens(curve: Sequence[tuple[float, float]], difference: float) -> Equivalent:
    """How many times its tokens the reference needs for a loss that is `difference` from its final one.

    curve: (tokens, validation loss) of the reference, in order. A higher loss is found on the curve itself, by linear
    interpolation of log tokens. A lower one is extrapolated by E + A tokens^-alpha, fitted to the curve after its first
    fifth by least squares with E, A >= 0. Both read a curve whose learning rate decays to the end of the run, where a
    longer run would decay later: they say what a difference is worth, not how another run would end.
    """
    points = [(tokens, loss) for tokens, loss in curve if tokens > 0]
    if len(points) < 5:
        return Equivalent(None, "fewer than five validations of the reference")
    last_tokens, last_loss = points[-1]
    if difference >= 0:
        return _on_the_curve(points, last_loss + difference)
    settled = [(t / last_tokens, loss) for t, loss in points if t >= _SETTLED * last_tokens]
    fit = _power_law([t for t, _ in settled], [loss for _, loss in settled]) if len(settled) >= 4 else None
    if fit is None:
        return Equivalent(None, "the reference's curve is no power law")
    floor, scale, exponent = fit
    remaining = scale + difference  # E + A at the end of the run; so much is left above E
    if remaining <= 0:
        return Equivalent(None, f"below {floor:.4g}, where the fitted curve ends")
    ratio = (scale / remaining) ** (1 / exponent)
    if ratio > _FARTHEST:
        return Equivalent(None, f"more than {_FARTHEST:g} times the reference's tokens")
    return Equivalent(ratio, "power law")


def _on_the_curve(points: Sequence[tuple[float, float]], loss: float) -> Equivalent:
    last = points[-1][0]
    for (t0, l0), (t1, l1) in reversed(list(pairwise(points))):
        if l1 <= loss <= l0:
            share = (l0 - loss) / (l0 - l1) if l0 > l1 else 1.0
            return Equivalent(math.exp(math.log(t0) + share * math.log(t1 / t0)) / last, "interpolation")
    return Equivalent(None, "above the reference's first validation")


def _power_law(tokens: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float] | None:
    """(E, A, alpha) of the best fit; None where the best is a bad one or does not fall."""
    t, y = np.asarray(tokens), np.asarray(losses)
    fits = []
    for exponent in np.geomspace(0.05, 4.0, 60):
        (floor, scale), residual = optimize.nnls(np.stack([np.ones_like(t), t**-exponent], axis=1), y)
        fits.append((float(residual), float(floor), float(scale), float(exponent)))
    residual, floor, scale, exponent = min(fits)
    drop = scale * (float(t[0]) ** -exponent - 1)
    if scale <= 0 or residual / math.sqrt(len(t)) > _RESIDUAL * drop:
        return None
    return floor, scale, exponent
