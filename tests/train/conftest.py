"""Runs that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsae.config import Config
from sparsae.config.load import resolve


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents with something to learn in them."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        lines = [f"item {j} of list {i}: {'abc' * (j % 5)} has {j % 7} parts and {i % 3} colours" for j in range(60)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def small(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    def make(*overrides: str, method: str = "sparsae-guided", preset: str = "demo") -> Config:
        cache = tmp_path_factory.getbasetemp() / "cache"
        settings = [
            f"data.source={text}", f"data.cache={cache}", "data.tokenizer_vocab=300", "model.layers=2",
            "model.width=32", "model.heads=2", "model.context=32", "training.steps=20",
            "training.batch_size=4", "training.log_every=5", "training.validation_sequences=4", "training.device=cpu",
        ]  # fmt: skip
        return resolve(None, preset, method, [*settings, *overrides])

    return make
