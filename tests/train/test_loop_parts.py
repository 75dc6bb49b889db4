"""The loop tells rows to whoever looks on, and its parts: rates, clocks, averages, and what a checkpoint carries."""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config import Config, TrainingConfig
from sparsae.core.randomness import generator
from sparsae.errors import DivergedError
from sparsae.observers import Observer, Standing
from sparsae.runs.checkpoint import CheckpointTimes
from sparsae.runs.manifest import Extension
from sparsae.runs.rows import Row, TrainRow
from sparsae.train import assemble, loop
from sparsae.train.assemble import optimizer_of, trainer_of
from sparsae.train.averages import Averages
from sparsae.train.data import TrainData
from sparsae.train.learning_rate import LearningRate
from sparsae.train.loop import Trainer
from sparsae.train.stopping import StopRequest
from sparsae.train.stopwatch import Stopwatch
from tests.support.loops import built, config_of

SMALL = (
    "model.layers=1", "model.width=32", "training.steps=12", "training.batch_size=2", "training.log_every=4",
    "training.validate_every=6", "training.checkpoint_minutes=null",
)  # fmt: skip


class Notes(Observer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def begin(self, standing: Standing) -> None:
        self.seen.append(standing)

    def observe(self, row: Row) -> None:
        self.seen.append(row)

    def end(self) -> None:
        self.seen.append("end")

    def kinds(self) -> list[tuple[str, int]]:
        return [(row.kind, row.step) for row in self.seen if isinstance(row, Row)]


def trainer(*overrides: str, observer: Observer | None = None, method: str = "set", **extra: Any) -> Trainer:
    config: Config = config_of(*SMALL, *overrides, method=method)
    tokens = torch.randint(300, (600,), generator=generator(3, "tokens")).numpy()
    validation = torch.randint(300, (3, config.model.context + 1), generator=generator(4, "tokens"))
    model, device = built(config), torch.device("cpu")
    data = TrainData.of(config, tokens, validation, tokens, device)
    return trainer_of(config, model, optimizer_of(model, config), data, device, [observer] if observer else [], **extra)


def test_an_observer_sees_every_row_between_beginning_and_end() -> None:
    notes = Notes()
    run = trainer("topology.every=5", observer=notes)
    assert run.run(StopRequest(), lambda: None)
    assert notes.seen[0] == Standing(0, 12)
    assert notes.seen[-1] == "end"
    assert notes.kinds() == [
        ("validation", 0), ("topology", 0), ("train", 4), ("topology", 5), ("validation", 6), ("train", 8),
        ("train", 12), ("validation", 12),
    ]  # fmt: skip
    for row in notes.seen[1:-1]:
        written = json.loads(json.dumps(row.to_dict()))
        assert written["kind"] == row.kind
        assert written["step"] == row.step


def test_an_observer_sees_why_and_that_it_ends() -> None:
    notes = Notes()
    with pytest.raises(DivergedError) as caught:
        trainer("training.learning_rate=1e30", "training.clip=null", observer=notes).run(StopRequest(), lambda: None)
    assert notes.kinds()[-1] == ("diverged", caught.value.step)
    assert notes.seen[-2].reason == caught.value.reason
    assert notes.seen[-1] == "end"
    notes = Notes()

    def full() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(observer=notes).run(StopRequest(), full)
    assert notes.seen[-1] == "end"


def test_a_run_that_goes_on_says_where_it_stands() -> None:
    first = trainer("topology.every=4", "training.steps=8")
    first.run(StopRequest(), lambda: None)
    extension = Extension(8, 8, 12)
    notes = Notes()
    again = trainer("topology.every=4", observer=notes, extension=extension)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.sparsifier is not None
    again.sparsifier.step = 8
    again.run(StopRequest(), lambda: None)
    assert notes.seen[0] == Standing(8, 12, updates=1, accepted=1)
    assert notes.seen[1].to_dict() == {
        "kind": "extended", "step": 8, "previous_steps": 8, "steps": 12, "warmup_steps": 1,
    }  # fmt: skip
    assert notes.seen[-2].train_flops > first.account.flops.total


@given(step=st.integers(0, 19), scale=st.floats(0.1, 4.0))
def test_a_group_gets_its_share_of_the_rate(step: int, scale: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr_scale": scale}], lr=1.0)
    settings = TrainingConfig(learning_rate=0.5, warmup=0.25, steps=20)
    rate = LearningRate(settings, Extension(10, 10, 410))
    assert optimizer.param_groups[0]["lr"] != (now := rate.set(optimizer, step))
    assert optimizer.param_groups[0]["lr"] == now * scale
    assert now == rate.at(step) <= 0.5
    if 10 <= step < 14:  # four steps of warm-up, one in a hundred of those that were added
        plain = LearningRate(settings)
        assert now == pytest.approx(plain.at(step) * (step - 9) / 4)


def test_the_rate_follows_the_schedule_that_is_set() -> None:
    settings = TrainingConfig(learning_rate=0.5, steps=20, warmup=0.1, schedule="wsd", decay=0.25)
    rates = [LearningRate(settings).at(step) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5] + [0.5] * 13 + [0.41, 0.32, 0.23, 0.14, 0.05])
    default = settings.model_copy(update={"decay": None})
    assert [LearningRate(default).at(step) for step in (15, 19)] == pytest.approx([0.5, 0.05])


def test_a_checkpoint_is_due_by_steps_or_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("sparsae.runs.checkpoint.time.monotonic", lambda: now)
    times = CheckpointTimes(every=5, minutes=1.0, step=3)
    assert [step for step in range(4, 12) if times.due(step)] == [5, 10]
    now = 59.9
    assert not times.due(7)
    now = 60.0
    assert times.due(7)
    times.saved(7)
    assert not times.due(8)
    assert times.last == 7
    now = 1e9
    assert not CheckpointTimes(None, None, 0).due(1)


def test_averages_are_over_the_steps_since_the_last_row_and_survive_a_stop() -> None:
    account = trainer().account
    averages = Averages()
    rows: list[TrainRow] = []
    for step in range(1, 7):
        for part in (0.0, 1.0):
            averages.add(step + part, step, 2.0 * step, passes=2)
        averages.end_step(taught=step > 3)
        if step % 3 == 0:
            rows.append(averages.row(step, account, 0.1, 1.0, False))
        again = Averages()
        again.load_state_dict(json.loads(json.dumps(averages.state_dict())))
        averages = again
    assert [row.loss for row in rows] == [2.5, 5.5]
    assert [row.cross_entropy for row in rows] == [2.0, 5.0]
    assert [row.distillation for row in rows] == [None, 10.0]
    assert rows[-1].tokens == 6 * account.tokens_per_step


def test_a_second_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("sparsae.train.stopwatch.time.perf_counter", lambda: now)
    watch = Stopwatch()
    with watch.of("train"):
        now = 2.0
        with watch.of("topology"):
            now = 3.0
            with watch.of("study"):
                now = 7.0
            now = 8.0
        now = 10.0
    assert watch.seconds == {"study": 4.0, "topology": 2.0, "train": 4.0}
    assert watch.total == now


def test_the_objects_of_a_run_are_given_what_exists_already() -> None:
    """A lambda in the place of an object would wait for one that is made later."""
    assert not [node for node in ast.walk(ast.parse(inspect.getsource(assemble))) if isinstance(node, ast.Lambda)]


def test_the_loop_knows_no_observer() -> None:
    imported = {
        node.module for node in ast.walk(ast.parse(inspect.getsource(loop))) if isinstance(node, ast.ImportFrom)
    }
    assert not imported & {"sparsae.train.progress", "sparsae.runs.metrics"}
    assert not [name for name in imported if name and name.startswith("sparsae.observers.")]
    assert "sparsae.config.training" in imported
