"""Trackers of this package: they get the numbers of the rows, and one that is missing is named before anything else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.observers import OBSERVERS, Standing
from sparsae.train.run import resume, start
from tests.support.records import train_row


def config(tmp_path: Path, *overrides: str) -> Config:
    return resolve(
        overrides=[
            "model={layers: 1, width: 16, heads: 2, context: 16}",
            f"data={{max_documents: 5, tokenizer_vocab: 300, cache: {tmp_path}/cache}}",
            "training={steps: 4, batch_size: 2, log_every: 2, validate_every: 4, validation_sequences: 2}",
            *overrides,
        ]
    )


class Client(ModuleType):
    """What trackio and W&B have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> None:
        self.begun = settings

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.rows.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("setting", ["tracking.tensorboard=true", "tracking.observers=[tensorboard]"])
def test_tensorboard_gets_the_numbers(setting: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    start(config(tmp_path, setting), tmp_path / "run", quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/cross_entropy")] == [2, 4]


def test_tensorboard_shows_no_step_twice_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = OBSERVERS["tensorboard"](tmp_path)
    for first, steps in ((0, range(1, 4)), (0, range(1, 10)), (5, range(6, 13))):
        observer.begin(Standing(step=first, steps=12))
        for step in steps:
            observer.observe(train_row(step=step))
        observer.end()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/cross_entropy")] == list(range(1, 13))


@pytest.mark.parametrize(("name", "own"), [("trackio", set()), ("wandb", {"dir", "id"})])
def test_a_tracker_gets_settings_and_numbers_and_its_end(
    name: str, own: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(name)
    monkeypatch.setitem(sys.modules, name, client)
    start(config(tmp_path, f"tracking.{name}=true", f"tracking.observers=[{name}]"), tmp_path / "run", quiet=True)
    assert set(client.begun) == {"project", "name", "config", "resume"} | own
    assert client.begun["project"] == "sparsae"
    assert client.begun["name"].startswith("run")
    assert client.begun["config"]["training"]["steps"] == 4
    assert [step for step, numbers in client.rows if "train/cross_entropy" in numbers] == [2, 4]
    assert client.finished == 1


@pytest.mark.parametrize(("name", "key"), [("trackio", "name"), ("wandb", "id")])
def test_a_tracker_knows_a_run_that_is_resumed_from_another_of_its_name(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, found = Client(name), []
    monkeypatch.setitem(sys.modules, name, client)
    for folder in ("here", "there"):
        run = tmp_path / folder / "run"
        run.parent.mkdir()
        start(config(tmp_path, f"tracking.{name}=true"), run, quiet=True)
        found.append(client.begun[key])
        resume(run, steps=8, quiet=True)
        assert client.begun[key] == found[-1]
        assert client.begun["resume"] == "allow"
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_shows_no_step_twice_of_a_run_that_crashed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(name)
    monkeypatch.setitem(sys.modules, name, client)
    log = client.log

    def crash(numbers: dict[str, float], step: int) -> None:
        log(numbers, step)
        if step == 3 and "train/loss" in numbers:
            raise RuntimeError("no network")

    monkeypatch.setattr(client, "log", crash)
    often = ("training={steps: 4, batch_size: 2, log_every: 1, checkpoint_every: 100, validation_sequences: 2}",)
    with pytest.raises(RuntimeError, match="no network"):
        start(config(tmp_path, *often, f"tracking.{name}=true"), tmp_path / "run", quiet=True)
    monkeypatch.setattr(client, "log", log)
    resume(tmp_path / "run", quiet=True)
    steps = [step for step, numbers in client.rows if "train/loss" in numbers]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    assert len(steps) <= 5  # of the last row before a crash nothing is certain


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(InputError, match=rf"pip install 'sparsae\[{name}\]'"):
        start(config(tmp_path, f"tracking.{name}=true"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("wandb")
    monkeypatch.setattr(client, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no network\nTraceback")))
    monkeypatch.setitem(sys.modules, "wandb", client)
    with pytest.raises(InputError, match=r"^--set: tracking\.wandb cannot start: no network$"):
        start(config(tmp_path, "tracking.wandb=true"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
