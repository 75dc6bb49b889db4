"""What a person sees while something goes on."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sparsae.train.loop import Trainer
from sparsae.train.progress import Display


def test_a_stage_that_lasts_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("sparsae.train.progress.time.monotonic", lambda: now)
    display = Display()
    for now in (0.0, 4.0, 11.0, 12.0, 25.0):
        display.stage("tokenize", int(now), 30)
    display.stage("evaluate", 1, None)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing ...",
        "tokenizing ... 11 of 30 documents, 11 s",
        "tokenizing ... 25 of 30 documents, 25 s",
        "evaluating ...",
    ]


def test_numbers_of_a_run_that_went_wrong_stay_readable(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.validation({"step": 3, "loss": 652.0, "perplexity": math.exp(652.0), "teacher_loss": None})
    display.topology(18, None)
    row = {
        "step": 4,
        "cross_entropy": 1.0,
        "distillation": None,
        "tokens_per_second": 9,
        "density": 0.1,
        "burn_in": False,
    }
    display.train(row, 20)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 3 · validation loss 652.0000, perplexity 1.45e+283"
    assert "updates 18 ·" in second
    assert "validation" not in second  # it has a line of its own, and this one's step is another
    display.topology(18, 7)
    display.train(row, 20)
    assert "updates 7/18 ·" in capsys.readouterr().err


@pytest.mark.parametrize(("clip", "advice"), [(None, "or set training.clip"), (1.0, "or training.clip (now 1)")])
def test_a_setting_that_is_set_is_not_advised_to_be_set(clip: float | None, advice: str) -> None:
    settings = SimpleNamespace(learning_rate=0.5, clip=clip)
    trainer: Any = SimpleNamespace(settings=settings, step=3, flops=SimpleNamespace(total=7))
    error = Trainer.diverged(trainer, "the loss is nan")
    assert str(error).endswith(f"lower training.learning_rate (now 0.5) {advice}")
