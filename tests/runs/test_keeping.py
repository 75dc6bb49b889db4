"""Which checkpoints a run keeps, and how they are written beside training."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.files import read_json
from sparsae.runs import checkpoint
from sparsae.runs.directory import RunDirectory, describe
from sparsae.train.loop import Trainer
from sparsae.train.objective import Objective
from sparsae.train.run import resume, start
from tests.runs.conftest import Make
from tests.support.faults import failing_disk
from tests.support.rundir import Killed, assert_same_run, killed_at
from tests.support.runs import contents, stopped_at, weights

LOSSES = {0: 6.0, 3: 5.0, 6: 4.0, 9: 4.5, 12: 4.2}


@pytest.fixture
def best_at_6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations after steps 0, 3, 6, ... have these losses."""
    step, begin = 0, Objective.begin_step

    def beginning(self: Objective, done: int) -> None:
        nonlocal step
        step = done + 1
        begin(self, done)

    monkeypatch.setattr(Objective, "begin_step", beginning)
    monkeypatch.setattr(Objective, "validate", lambda self, rows: (LOSSES[step], None))


@pytest.mark.usefixtures("best_at_6")
def test_the_best_checkpoint_is_kept_beside_the_newest(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = make("training.keep_best=true", "training.validate_every=3"), tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, 10)
        with pytest.raises(Killed):
            start(config, run, quiet=True)
    assert RunDirectory(run).saved_steps() == [6]
    resume(run, quiet=True)
    assert RunDirectory(run).saved_steps() == [6, 12]
    assert (load_run(run).step, load_run(run, best=True).step) == (12, 6)
    assert evaluate_run(run, best=True)["step"] == 6
    assert main(["generate", str(run), "--prompt", "item", "--tokens", "2", "--best"]) == 0
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--best"]) == 0
    for best in (True, False):
        out = tmp_path / f"from-{best}"
        assert main(["train", "--from", str(run), "--steps", "3", "--out", str(out)] + ["--best"] * best) == 0
        assert read_json(out / "summary.json")["started_from"]["step"] == (6 if best else 12)
    assert describe(run)["best_step"] == 6
    losses = {}
    curve = ["check", "sparsity", str(run), "--sparsities", "0.95", "--max-tokens", "200", "--json", "-"]
    for best in (True, False):
        capsys.readouterr()
        assert main(curve + ["--best"] * best) == 0
        losses[best] = json.loads(capsys.readouterr().out)["unpruned_loss"]
        assert losses[best] == pytest.approx(evaluate_run(run, max_tokens=200, best=best)["loss"], abs=1e-3)
    assert abs(losses[True] - losses[False]) > 1e-2


def test_a_run_that_keeps_no_best_has_none(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"keeps no best checkpoint.*training\.keep_best=true"):
        load_run(finished, best=True)
    capsys.readouterr()
    for further in (["--out", str(tmp_path / "next")], ["--dry-run"], ["--print-config"]):
        assert main(["train", "--from", str(finished), "--best", *further]) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"sparsae: error: {finished}: this run keeps no best checkpoint")
        assert told.out == ""
    assert not (tmp_path / "next").exists()


@pytest.mark.usefixtures("best_at_6")
def test_a_best_one_that_was_not_kept_then_is_forgotten_where_it_is_to_be_kept(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with stopped_at(8):
        start(make("training.validate_every=3"), run, quiet=True)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("keep_best: false", "keep_best: true"))
    resume(run, quiet=True, allowed=["training.keep_best"])
    assert load_run(run, best=True).step == 12  # the better one after step 6 is gone; that after step 9 was worse


EVERY_4 = ("training.checkpoint_every=4", "training.keep_checkpoints=3")


def test_a_checkpoint_beside_training_is_that_of_its_step_and_not_there_until_it_is_whole(
    make: Make, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(make(*EVERY_4), tmp_path / "sync", quiet=True)
    run, go_on, write, step, seen = tmp_path / "run", threading.Event(), checkpoint._write, Trainer.stepping, []

    def slow(*given: object) -> None:
        assert go_on.wait(60)
        write(*given)

    def stepping(self: Trainer) -> Iterator[object]:
        yield from step(self)
        if self.step in (5, 6, 7):
            seen.append(RunDirectory(run).saved_steps())
        if self.step == 7:
            go_on.set()

    monkeypatch.setattr(checkpoint, "_write", slow)
    monkeypatch.setattr(Trainer, "stepping", stepping)
    start(make(*EVERY_4, "training.checkpoint_async=true"), run, quiet=True)
    assert seen == [[], [], []]
    assert RunDirectory(run).saved_steps() == [4, 8, 12]
    for name, content in contents(tmp_path / "sync" / "checkpoints").items():
        if name.endswith(".safetensors"):
            assert (run / "checkpoints" / name).read_bytes() == content, name
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_beside_training_ends_it_with_a_line(
    make: Make, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run, failing = tmp_path / "run", []
    write = checkpoint._write

    def writing(directory: Path, *given: object) -> None:
        if "step-00000008" in directory.name:
            failing.append(fault.__enter__())
        write(directory, *given)  # type: ignore[arg-type]

    fault = failing_disk(call, 1)
    monkeypatch.setattr(checkpoint, "_write", writing)
    with pytest.raises(InputError, match=r"step-00000008 cannot be written.*No space left"):
        start(make(*EVERY_4, "training.checkpoint_async=true"), run, quiet=True)
    fault.__exit__(None, None, None)
    assert failing[0]()
    assert RunDirectory(run).saved_steps() == [4]
    monkeypatch.undo()
    resume(run, quiet=True)
    assert weights(run) == weights(unbroken)


@pytest.mark.parametrize("beside", ["false", "true"])
def test_a_checkpoint_that_cannot_be_removed_at_once_ends_no_run(make: Make, tmp_path: Path, beside: str) -> None:
    run, settings = tmp_path / "run", ("training.keep_checkpoints=1", f"training.checkpoint_async={beside}")
    with stopped_at(10), failing_disk("rmdir", 1) as failed:
        start(make("training.checkpoint_every=4", *settings), run, quiet=True)
    assert failed()
    assert RunDirectory(run).saved_steps() == [10]
    assert resume(run, quiet=True)["finished"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]


def test_a_run_that_is_trained_meanwhile_is_read_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was replaced between looking and reading; what is gone for good is still told."""
    run = RunDirectory(finished)
    (newest,) = run.checkpoints.glob("step-*")
    first = newest.with_name("step-00000009")
    whole = checkpoint.load_checkpoint

    def replaced(directory: Path, *groups: str) -> object:
        if first.exists():
            first.rename(newest)
            raise InputError(f"checkpoint {directory} is damaged")
        return whole(directory, *groups)

    monkeypatch.setattr("sparsae.evaluate.loading.load_checkpoint", replaced)
    newest.rename(first)
    monkeypatch.setattr(RunDirectory, "_latest", lambda self, _: self.checkpoint(self.saved_steps()[-1]))
    assert load_run(finished).step == 12
    monkeypatch.undo()
    newest.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load_run(finished)


def test_a_run_whose_newest_checkpoint_was_lost_is_trained_again_from_the_one_before(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(make("training.checkpoint_every=3", "training.keep_checkpoints=3"), run, quiet=True)
    expected = weights(run)
    (run / "checkpoints" / "step-00000012" / "state.json").unlink()
    assert main(["generate", str(run), "--prompt", "item"]) == 2
    assert "train it again from step 9: --resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert weights(run) == expected
    assert main(["train", "--resume", str(run)]) == 2
    assert "is finished" in capsys.readouterr().err


def test_a_run_that_is_removed_while_it_trains_ends_there(make: Make, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", Trainer.stepping

    def stepping(self: Trainer) -> Any:
        yield from whole(self)
        if self.step == 4:
            shutil.rmtree(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "stepping", stepping)
        with pytest.raises(InputError, match=r"cannot be written.*No such file"):
            start(make("training.checkpoint_every=3"), run, quiet=True)
    assert not run.exists()
