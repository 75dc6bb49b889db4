"""Held-out losses of a run: when they are measured, and what they were.

Settings are tuned, and runs are watched, by the validation loss. A result that was chosen by a number should not be
reported by the same number: the test loss is measured once, at the end, on sequences that nothing else reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsae.config.training import TrainingConfig
from sparsae.runs.rows import ValidationRow, perplexity
from sparsae.train.account import Account
from sparsae.train.objective import Objective


class Validation:
    """The latest losses of model and teacher, and that of the untrained model; NaN before there are any.

    `best` is the step and the loss of the best validation since the first step.

    `test_loss` is None until the end, and where the held-out text has no sequence for it.
    """

    def __init__(self, objective: Objective, rows: Tensor, test: Tensor | None, settings: TrainingConfig) -> None:
        self._objective, self._rows, self._test, self._steps = objective, rows, test, settings.steps
        self._every = settings.validate_every or max(10, settings.steps // 10)
        self.loss = self.untrained = math.nan
        self.teacher_loss: float | None = None
        self.best: tuple[int, float] | None = None
        self.test_loss: float | None = None

    def due(self, step: int) -> bool:
        """Whether it follows this step, counted from 1."""
        return step % self._every == 0 or step == self._steps

    def measure(self, step: int, account: Account) -> ValidationRow:
        """With the parameters as they are after so many steps; an improvement may end the teacher's warm-up."""
        with account.watch.of("validation"):
            self.loss, self.teacher_loss = self._objective.validate(self._rows)
        if step == 0:
            self.untrained = self.loss
        elif self.best is None or self.loss < self.best[1]:
            self.best = step, self.loss
        return ValidationRow(
            step=step,
            tokens=account.tokens(step),
            loss=self.loss,
            perplexity=perplexity(self.loss),
            teacher_loss=self.teacher_loss,
            train_flops=account.flops.total,
            seconds=account.watch.total,
        )

    def measure_test(self, account: Account) -> float | None:
        """The model's loss as it is on the test rows, which may be called for at the end alone."""
        if self._test is not None and len(self._test):
            with account.watch.of("validation"):
                self._objective.model.eval()
                self.test_loss = self._objective.mean(self._test)
        return self.test_loss

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"loss": self.loss, "untrained": self.untrained, "teacher_loss": self.teacher_loss, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, in whose JSON what is not finite is null."""
        self.loss, self.untrained = (math.nan if (x := state[k]) is None else x for k in ("loss", "untrained"))
        self.teacher_loss = state["teacher_loss"]
        self.best = None if (best := state.get("best")) is None else (best[0], best[1])
