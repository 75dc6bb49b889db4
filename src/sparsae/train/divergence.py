"""The end of a run whose numbers are none any more."""

from __future__ import annotations

from sparsae.config.schema import TrainingConfig
from sparsae.errors import DivergedError


def diverged(settings: TrainingConfig, reason: str, step: int, train_flops: int) -> DivergedError:
    """The error of a run that cannot continue from `step`: `reason` says what is not finite."""
    clip = "set training.clip" if settings.clip is None else f"training.clip (now {settings.clip:g})"
    return DivergedError(
        f"training diverged: {reason} at step {step}; lower training.learning_rate "
        f"(now {settings.learning_rate:g}) or {clip}",
        step,
        train_flops,
        reason,
    )
