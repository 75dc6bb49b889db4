"""When the teacher teaches, and how much of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsae.config.teacher import TeacherConfig
from sparsae.errors import require_state


class WarmUp:
    """Which steps and sequences are taught.

    None before a share of the steps, or before validation improves past a threshold, nor before there is a teacher;
    then every n-th step, and in it a share of the sequences.
    """

    def __init__(self, config: TeacherConfig, steps: int) -> None:
        self._config = config
        self._steps = steps
        self._first_loss: float | None = None
        self.over_by_validation = False

    def alpha(self, step: int) -> float:
        """Weight of the KL term at a step counted from 0; 0 during the warm-up and at steps that are not taught."""
        if step % self._config.every or step < self._config.start * self._steps:
            return 0.0
        if self._config.warmup == "fraction":
            over = step >= self._config.warmup_fraction * self._steps
        else:
            over = self.over_by_validation
        return self._config.alpha if over else 0.0

    def taught(self, step: int, index: int, passes: int, rows: int) -> int:
        """How many of the `rows` sequences of a step's forward pass `index` are taught, the first ones.

        A function of these numbers alone: over the taught steps of a training it is `share` of all, to within one.
        """
        before = (step // self._config.every * passes + index) * rows
        share = self._config.share
        return math.floor(share * (before + rows)) - math.floor(share * before)

    def taught_over(self, steps: range, passes: int, rows: int) -> int:
        """The sum of `taught` over all forward passes of the steps of a stretch at which `alpha` is above 0.

        What one pass begins with is what the one before ended with, so the ends are all that counts.
        """
        if not self._config.alpha or (self._config.warmup != "fraction" and not self.over_by_validation):
            return 0
        shares = (self._config.start, self._config.warmup_fraction if self._config.warmup == "fraction" else 0.0)
        first = max(steps.start, *(math.ceil(share * self._steps) for share in shares))
        begin, end = (-(-step // self._config.every) * passes * rows for step in (first, steps.stop))
        share = self._config.share
        return math.floor(share * end) - math.floor(share * begin) if begin < end else 0

    def observe(self, validation_loss: float) -> None:
        """Take note of a validation loss (nats); the first one is the untrained model's."""
        if self._first_loss is None:
            self._first_loss = validation_loss
        if validation_loss <= self._first_loss - self._config.warmup_improvement:
            self.over_by_validation = True

    def state_dict(self) -> dict[str, float | bool | None]:
        """Plain values."""
        return {"first_loss": self._first_loss, "over_by_validation": self.over_by_validation}

    def load_state_dict(self, state: Mapping[str, float | bool | None]) -> None:
        """From `state_dict`. Raises InputError for anything else."""
        require_state("WarmUp", state, self.state_dict())
        first = state["first_loss"]
        self._first_loss = None if first is None else float(first)
        self.over_by_validation = bool(state["over_by_validation"])
