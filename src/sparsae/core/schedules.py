"""How a quantity moves over a run: pure functions of the step or of the share of the run that has passed."""

from __future__ import annotations

import math
from typing import Literal


def cosine_with_warmup(step: int, steps: int, warmup: float, final: float) -> float:
    """Multiplier of the peak at `step` of `steps`, counted from 0.

    With w = warmup * steps: (step + 1) / w while step < w, then final + (1 - final) (1 + cos(pi t)) / 2 with t going
    from 0 to 1 over the remaining steps. Never 0 at the first step.
    """
    warm_steps = round(warmup * steps)
    if step < warm_steps:
        return (step + 1) / warm_steps
    progress = (step - warm_steps) / max(1, steps - 1 - warm_steps)
    return final + (1.0 - final) * decayed("cosine", min(1.0, progress))


def decayed(kind: Literal["constant", "linear", "cosine"], progress: float) -> float:
    """1 at progress 0 and, but for "constant", 0 at progress 1: 1 - p, or (1 + cos(pi p)) / 2."""
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return (1.0 + math.cos(math.pi * progress)) / 2.0
    raise ValueError(f"unknown schedule '{kind}': use constant, linear or cosine")
