"""Observers that somebody else brings along: found by name, told every row, and refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsae import OBSERVERS, InputError, Observer
from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.observers import Standing
from sparsae.runs.rows import Row
from sparsae.train.run import resume, start


class Note(Observer):
    """Writes the kind and step of every row into the run's directory."""

    def __init__(self, run: Path) -> None:
        self.file = run / "note.txt"

    def write(self, line: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{line}\n")

    def begin(self, standing: Standing) -> None:
        self.write(f"begin {standing.step} of {standing.steps}")

    def observe(self, row: Row) -> None:
        self.write(f"{row.kind} {row.step}")

    def end(self) -> None:
        self.write("end")


@pytest.fixture
def note() -> Iterator[None]:
    OBSERVERS.register("note")(Note)
    yield
    del OBSERVERS._entries["note"]


def config(tmp_path: Path, *observers: str) -> Config:
    return resolve(
        overrides=[
            "model={layers: 1, width: 16, heads: 2, context: 16}",
            f"data={{max_documents: 5, tokenizer_vocab: 300, cache: {tmp_path}/cache}}",
            "training={steps: 4, batch_size: 2, log_every: 2, validate_every: 4, validation_sequences: 2}",
            f"tracking.observers=[{', '.join(observers)}]",
        ]
    )


@pytest.mark.usefixtures("note")
def test_an_observer_by_name_is_told_every_row_as_the_metrics_are(tmp_path: Path) -> None:
    summary = start(config(tmp_path, "note"), tmp_path / "run", quiet=True)
    lines = (tmp_path / "run" / "note.txt").read_text().splitlines()
    assert lines[0] == "begin 0 of 4"
    assert lines[-1] == "end"
    rows = [line.split()[:2] for line in lines[1:-1]]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == len(metrics) == 5
    assert all(f'"kind": "{kind}", "step": {step},' in line for (kind, step), line in zip(rows, metrics, strict=True))
    plain = start(config(tmp_path), tmp_path / "plain", quiet=True)
    assert summary["validation_loss"] == plain["validation_loss"]


@pytest.mark.usefixtures("note")
def test_a_run_with_more_steps_tells_it_where_it_goes_on(tmp_path: Path) -> None:
    start(config(tmp_path, "note"), tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True, steps=6)
    assert "begin 4 of 6" in (tmp_path / "run" / "note.txt").read_text()


def test_one_that_is_not_known_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^no observer 'none': use one of tensorboard, .* file by SPARSAE_IMPORT$"):
        start(config(tmp_path, "none"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("note")
def test_a_name_belongs_to_one(tmp_path: Path) -> None:
    class Other(Note):
        """Another class, of the same name."""

    OBSERVERS.register("note")(Note)
    with pytest.raises(InputError, match=r"observer 'note' is registered already, by .*Note: take another name"):
        OBSERVERS.register("note")(Other)


class Failing(Note):
    """Cannot be made."""

    def __init__(self, run: Path) -> None:
        raise InputError("it cannot start")


@pytest.mark.usefixtures("note")
def test_one_that_was_made_is_ended_where_another_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Path] = []
    monkeypatch.setattr(Note, "end", lambda self: ended.append(self.file))
    monkeypatch.setitem(OBSERVERS._entries, "failing", Failing)
    with pytest.raises(InputError, match="it cannot start"):
        start(config(tmp_path, "note", "failing"), tmp_path / "run", quiet=True)
    assert ended == [tmp_path / "run" / "note.txt"]
