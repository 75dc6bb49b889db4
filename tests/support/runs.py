"""Runs that take a second: their text, their settings, and what has to be equal in two of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.runs.rows import TIMES
from sparsae.train.loop import Trainer
from sparsae.train.passes import Passes


def write_text(folder: Path) -> Path:
    """A few documents with something to learn in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(30):
        lines = [f"item {j} of list {i}: {'abc' * (j % 5)} has {j % 7} parts and {i % 3} colours" for j in range(60)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


def config_of(text: Path, cache: Path, *overrides: str, method: str = "sparsae-guided") -> Config:
    every = [] if method in ("static", "dense", "magnitude") else ["topology.every=4"]
    settings = [
        f"data.source={text}", f"data.cache={cache}", "data.tokenizer_vocab=300", "model.layers=1", "model.width=32",
        "model.heads=2", "model.context=16", "training.steps=12", "training.batch_size=2", "training.log_every=3",
        "training.validation_sequences=4", "training.device=cpu", "training.threads=1", "tracking.sample_tokens=4",
    ]  # fmt: skip
    return resolve(None, "demo", method, [*settings, *every, *overrides])


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read]


def weights(run: Path) -> bytes:
    """The newest checkpoint's student, optimizer, teacher and search, byte for byte."""
    newest = max((run / "checkpoints").glob("step-*"))
    return b"".join(path.read_bytes() for path in sorted(newest.glob("*.safetensors")))


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Runs inside are sent SIGTERM once so many steps are done."""
    whole = Trainer.stepping

    def stepping(self: Trainer) -> Passes[None]:
        yield from whole(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "stepping", stepping)
        yield


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
