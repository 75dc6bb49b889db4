"""What the Trainer calls while a task is trained: progress, and scores after each epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Following(TrainerCallback):
    """Tells of every step and every epoch."""

    def __init__(self, step_done: Callable[[], None], epoch_done: Callable[[], None]) -> None:
        self._step_done, self._epoch_done = step_done, epoch_done

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_done()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch_done()
