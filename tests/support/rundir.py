"""A run that ends in the middle, and two that are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsae.train.loop import Trainer
from sparsae.train.passes import Passes
from tests.support.runs import rows, weights


class Killed(BaseException):
    """As if the process ended here: nothing that comes after it may be needed."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Trainer], None] | None = None) -> None:
    whole = Trainer.stepping

    def stepping(self: Trainer) -> Passes[None]:
        yield from whole(self)
        if self.step == step:
            if act is None:
                raise Killed
            act(self)

    monkeypatch.setattr(Trainer, "stepping", stepping)


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert weights(one) == weights(other)
