"""What the Trainer calls while a task is trained: progress, scores after each epoch, and the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.updates import Update


class Following(TrainerCallback):
    """Tells of every step and every epoch."""

    def __init__(self, step_done: Callable[[], None], epoch_done: Callable[[], None]) -> None:
        self._step_done, self._epoch_done = step_done, epoch_done

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_done()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch_done()


class Searching(TrainerCallback):
    """Lets a Sparsifier move connections from the first step to the last; `swaps` counts how many it replaced."""

    def __init__(self, config: SparsifierConfig) -> None:
        self.config, self.swaps = config, 0
        self._sparsifier: Sparsifier | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._sparsifier = Sparsifier(given["model"], given["optimizer"], self.config).attach(on_update=self._count)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._sparsifier is not None:
            self._sparsifier.close()

    def _count(self, update: Update) -> None:
        if update.accepted:
            self.swaps += update.row["swaps"]
