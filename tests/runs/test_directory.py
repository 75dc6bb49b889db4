"""The run directory: what it refuses, and files that are whole or not there."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.files import sealed, to_json, write_atomically
from sparsae.runs.claim import claimed, refuse_occupied
from sparsae.runs.directory import CHECKPOINT_FORMAT, RunDirectory, describe, read_state
from sparsae.runs.manifest import Manifest
from sparsae.runs.metrics import MetricsWriter
from sparsae.runs.rows import Row
from tests.support.records import summary_of, train_row, validation_row


def append(run: RunDirectory, row: Row) -> None:
    with MetricsWriter(run.metrics) as writer:
        writer.write(row)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    manifest = Manifest(resolve(None, "tiny", "static", ["seed=3"]), run="r")
    manifest.write(run.path)
    manifest.write_config(run.config_file)
    return run


def steps(run: RunDirectory) -> list[int]:
    return [row.step for row in run.read_metrics(Row)]


def save_checkpoint(run: RunDirectory, step: int) -> Path:
    path = run.checkpoint(step)
    path.mkdir(parents=True)
    size = run.metrics.stat().st_size if run.metrics.exists() else 0
    position = {"bytes": size, "sha256": hashlib.sha256(run.metrics.read_bytes() if size else b"").hexdigest()}
    state = {"format": CHECKPOINT_FORMAT, "run": "r", "files": {}, "trainer": {"step": step}, "metrics": position}
    (path / "state.json").write_text(sealed(state | {"corpus": "c", "threads": 1}))
    return path


def create(path: Path) -> None:
    refuse_occupied(path)
    with claimed(path):
        pass


class TestCreate:
    def test_makes_parents_and_takes_an_empty_directory(self, tmp_path: Path) -> None:
        create(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        create(tmp_path / "a" / "b")

    def test_refuses_what_is_there(self, tmp_path: Path, run: RunDirectory) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("x")
        with pytest.raises(InputError, match="is a file"):
            create(tmp_path / "file")
        with pytest.raises(InputError, match="is not empty"):
            create(tmp_path / "full")
        with pytest.raises(InputError, match="--resume"):
            create(run.path)

    def test_refuses_where_nothing_can_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match="cannot make"):
            create(tmp_path / "file" / "run")

    def test_refuses_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who runs many tests, may write anywhere
        with pytest.raises(InputError, match="no permission"):
            create(tmp_path)


class TestOpen:
    def test_refuses_what_is_not_a_run(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for path, complaint in (
            (tmp_path / "none", "no such directory"),
            (tmp_path / "file", "not a directory"),
            (tmp_path, "no config.yaml"),
        ):
            with pytest.raises(InputError, match=complaint):
                RunDirectory.open(path)

    def test_reads_the_settings(self, run: RunDirectory) -> None:
        config = RunDirectory.open(run.path).config()
        assert config == resolve(None, "tiny", "static", ["seed=3"])

    def test_names_damaged_settings(self, run: RunDirectory) -> None:
        run.config_file.write_text("training: {steps: x}")
        with pytest.raises(InputError, match=r"config\.yaml: training\.steps"):
            run.config()


class TestCheckpoints:
    def test_the_latest_is_the_highest_whole_one(self, run: RunDirectory) -> None:
        with pytest.raises(InputError, match="no checkpoint"):
            run.latest_checkpoint()
        for step in (9, 100, 20):
            save_checkpoint(run, step)
        run.checkpoint(500).mkdir()  # without its state.json: torn
        (run.checkpoints / ".step-00000900.partial").mkdir()
        assert run.latest_checkpoint(or_earlier=True) == run.checkpoints / "step-00000100"
        with pytest.raises(InputError, match="step-00000500 is gone or damaged"):
            run.latest_checkpoint()
        assert run.saved_steps() == [9, 20, 100]


class TestMetrics:
    def test_rows_are_there_as_soon_as_they_are_written(self, run: RunDirectory) -> None:
        assert run.read_metrics(Row) == []
        with MetricsWriter(run.metrics) as writer:
            writer.write(train_row(1, loss=math.nan, gradient_norm=math.inf))
            (row,) = run.read_metrics(Row)
            assert row.to_dict() == {**train_row(1).to_dict(), "loss": None, "gradient_norm": None}
        append(run, train_row(2))
        assert steps(run) == [1, 2]

    @pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step"\n', "\0\0\0", "12", "[" * 100_000])
    def test_a_torn_last_line_is_left_out(self, run: RunDirectory, torn: str) -> None:
        run.metrics.write_text("".join(f"{to_json(train_row(step).to_dict())}\n" for step in (1, 2, 3)) + torn)
        assert steps(run) == [1, 2, 3]

    def test_damage_elsewhere_is_named(self, run: RunDirectory) -> None:
        first, last = (to_json(train_row(step).to_dict()) for step in (1, 3))
        run.metrics.write_text(f"{first}\nx\n{last}\n")
        with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not a row"):
            run.read_metrics(Row)
        run.metrics.write_text(f"{last}\n{first}\n")
        with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 goes back"):
            run.read_metrics(Row)

    @settings(max_examples=30)
    @given(before=st.lists(st.integers(0, 20)), after=st.binary(max_size=40), flip=st.integers(0, 500))
    def test_truncating_keeps_earlier_bytes_and_sees_that_they_are_the_same(
        self, tmp_path_factory: pytest.TempPathFactory, before: list[int], after: bytes, flip: int
    ) -> None:
        run = RunDirectory(tmp_path_factory.mktemp("run"))
        with MetricsWriter(run.metrics) as writer:
            for step in before:
                writer.write(train_row(step))
            position = writer.position()
        kept = run.metrics.read_bytes()
        with MetricsWriter(run.metrics) as writer:  # another process resumes it
            assert writer.position() == position
        run.metrics.write_bytes(kept + after)
        run.require_metrics(position)
        with MetricsWriter(run.metrics) as writer:
            writer.cut(position)
            assert writer.position() == position
        assert run.metrics.read_bytes() == kept
        if kept:
            changed = bytearray(kept)
            changed[flip % len(kept)] ^= 1
            run.metrics.write_bytes(bytes(changed) + after)
            with pytest.raises(InputError, match=r"metrics\.jsonl: was changed"):
                run.require_metrics(position)
            run.metrics.write_bytes(kept[:-1])
            with pytest.raises(InputError, match="rows are missing"):
                run.require_metrics(position)


class TestJson:
    def test_numbers_that_json_lacks_become_null(self) -> None:
        assert json.loads(to_json({"a": -math.inf, "b": (math.nan, 1), "c": "nan"})) == {
            "a": None,
            "b": [None, 1],
            "c": "nan",
        }

    def test_a_failed_write_leaves_the_old_file(self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        run.write_summary(summary_of(steps=1))

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            write_atomically(run.summary, "{}")
        assert caught.value.filename == str(run.summary)
        assert run.read_summary() == summary_of(steps=1)
        assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "manifest.json", "summary.json"]


class TestDescribe:
    def test_a_run_that_has_just_begun(self, run: RunDirectory) -> None:
        known = describe(run.path)
        assert (known["preset"], known["method"], known["seed"]) == ("tiny", "static", 3)
        assert (known["steps"], known["steps_planned"], known["checkpoint_step"]) == (0, 2000, None)
        assert known["finished"] is False

    def test_a_run_without_a_summary_shows_its_latest_metrics(self, run: RunDirectory) -> None:
        save_checkpoint(run, 10)
        for step in (10, 20):
            append(run, train_row(step, tokens=step * 8, nnz=5))
            append(run, validation_row(step, 1.0 / step))
        known = describe(run.path)
        assert (known["steps"], known["tokens"], known["nnz"]) == (20, 160, 5)
        assert (known["validation_loss"], known["checkpoint_step"]) == (0.05, 10)

    def test_a_summary_is_passed_on(self, run: RunDirectory) -> None:
        run.write_summary(summary_of(steps=2000, finished=True, validation_loss=3.2))
        known = describe(run.path)
        assert (known["steps"], known["finished"], known["validation_loss"]) == (2000, True, 3.2)

    @pytest.mark.parametrize("content", ["", "[1]", "{", "\x00"])
    def test_a_damaged_summary_is_named(self, run: RunDirectory, content: str) -> None:
        run.summary.write_text(content)
        with pytest.raises(InputError, match=r"summary\.json.*damaged"):
            describe(run.path)


class TestWhileItTrains:
    """The newest checkpoint is replaced between a look at the directory and a look at the file."""

    @pytest.mark.parametrize(
        "read",
        [
            lambda run: run.newest_state()["trainer"]["step"],
            lambda run: run.best_step(),
            lambda run: run.read_metrics(Row) == [] and 7,
            lambda run: run.latest_checkpoint() == run.checkpoint(7) and 7,
        ],
    )
    def test_what_is_read_is_of_the_next_one(
        self, run: RunDirectory, read: Callable[[RunDirectory], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = resolve(run.config_file)
        kept = own.model_copy(update={"training": own.training.model_copy(update={"keep_best": True})})
        monkeypatch.setattr(RunDirectory, "config", lambda _: kept)
        run.metrics.touch()
        save_checkpoint(run, 3)
        asked = []

        def replaced(checkpoint: Path) -> dict[str, Any]:
            if not asked:
                shutil.rmtree(save_checkpoint(run, 7).with_name("step-00000003"))
            asked.append(checkpoint)
            state = read_state(checkpoint)
            return {**state, "trainer": {**state["trainer"], "validation": {"best": [7, 1.0]}}}

        monkeypatch.setattr("sparsae.runs.directory.read_state", replaced)
        assert read(run) == 7
        assert asked[0] == run.checkpoint(3)
