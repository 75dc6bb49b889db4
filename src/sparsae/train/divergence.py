"""The end of a run whose numbers are none any more."""

from __future__ import annotations

from sparsae.config.training import TrainingConfig
from sparsae.errors import DivergedError


def diverged(settings: TrainingConfig, reason: str, step: int, train_flops: int) -> DivergedError:
    """The error of a run that cannot continue from `step`: `reason` says what is not finite."""
    rates = {name: getattr(settings, name) for name in ("learning_rate", "sparse_learning_rate")}
    lower = " and ".join(f"training.{name} (now {rate:g})" for name, rate in rates.items() if rate is not None)
    clip = "set training.clip" if settings.clip is None else f"training.clip (now {settings.clip:g})"
    return DivergedError(
        f"training diverged: {reason} at step {step}; lower {lower} or {clip}",
        step,
        train_flops,
        reason,
    )
