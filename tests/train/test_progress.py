"""What a person sees while something is at work."""

from __future__ import annotations

import math

import pytest

from sparsae.config.training import TrainingConfig
from sparsae.observers import Standing
from sparsae.train.divergence import diverged
from sparsae.train.progress import Display
from tests.support.records import topology_row, train_row, validation_row


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
        "tokenizing ... 11 of 30 documents, 11 s · ETA 0:00:19",
        "tokenizing ... 25 of 30 documents, 25 s · ETA 0:00:05",
        "evaluating ...",
    ]


def test_numbers_of_a_run_that_went_wrong_stay_readable(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.begin(Standing(step=0, steps=20, updates=16, accepted=16))
    display.observe(validation_row(3, 652.0, perplexity=math.exp(652.0)))
    for step, accepted in ((0, False), (1, True), (2, True)):  # the first topology is no update
        display.observe(topology_row(step, accepted=accepted))
    row = train_row(4)
    display.observe(row)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 3 · validation loss 652.0000, perplexity 1.45e+283"
    assert "updates 18 ·" in second
    assert "validation" not in second  # it has a line of its own, and this one's step is another
    display.observe(topology_row(5))
    display.observe(row)
    assert "updates 18/19 ·" in capsys.readouterr().err


@pytest.mark.parametrize(("clip", "advice"), [(None, "or set training.clip"), (1.0, "or training.clip (now 1)")])
def test_a_setting_that_is_set_is_not_advised_to_be_set(clip: float | None, advice: str) -> None:
    error = diverged(TrainingConfig(learning_rate=0.5, weight_decay=0, clip=clip), "the loss is nan", 3, 7)
    assert str(error).endswith(f"lower training.learning_rate (now 0.5) {advice}")


def test_weight_decay_is_named_where_there_is_any() -> None:
    error = diverged(TrainingConfig(learning_rate=0.5, weight_decay=1e30), "the loss is nan", 3, 7)
    assert "lower training.learning_rate (now 0.5) and training.weight_decay (now 1e+30) or" in str(error)
