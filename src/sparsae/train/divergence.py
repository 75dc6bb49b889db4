"""The end of a run whose numbers are none any more."""

from __future__ import annotations

from sparsae.config.training import TrainingConfig
from sparsae.errors import DivergedError


def diverged(settings: TrainingConfig, reason: str, step: int, train_flops: int) -> DivergedError:
    """The error of a run that cannot continue from `step`: `reason` says what is not finite."""
    causes = {name: getattr(settings, name) for name in ("learning_rate", "sparse_learning_rate", "weight_decay")}
    lower = " and ".join(f"training.{name} (now {value:g})" for name, value in causes.items() if value)
    clip = "set training.clip" if settings.clip is None else f"training.clip (now {settings.clip:g})"
    return DivergedError(
        f"training diverged: {reason} after step {step}; lower {lower} or {clip}",
        step,
        train_flops,
        reason,
    )
