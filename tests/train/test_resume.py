"""Whole runs on a small text that are stopped, damaged, wrong or resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.train.run import resume, start
from tests.support.training import metrics


def test_checkpoints_are_kept_and_damage_is_named(small: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(small("training.checkpoint_every=5", "training.keep_checkpoints=2"), run, quiet=True)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000015", "step-00000020"]
    weights = run / "checkpoints" / "step-00000020" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"damaged: model\.safetensors"):
        load_run(run)
    (run / "checkpoints" / "step-00000020" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json cannot be read"):
        evaluate_run(run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vocab_size=100"], "model.vocab_size is 100"),
        (["sparsity.unit=[5,5]"], "does not divide layer"),
        (["sparsity.unit=[32,32]", "sparsity.sparsity=0.99"], "which need one each"),
        (["sparsity.include=['nothing.*']"], "no layer to sparsify"),
        (["training.device=cuda:7"], "is not there"),
        (["training.device=quantum"], "is no device"),
        (["sparsity.backend=fast"], r"unknown sparsity\.backend"),
        (["sparsity.sparsity=0"], "nothing to swap"),
        (["model.context=4096"], "fewer than one window"),
        (["data.source=/nowhere/*.txt"], "/nowhere"),
        (["data.tokenizer=/nowhere/tokenizer.json"], "/nowhere"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    small: Callable[..., Config], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        start(small(*overrides), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def died(run: Path) -> None:
    """As if the last checkpoint and the summary had not been written."""
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    (run / "summary.json").unlink()


def test_resume_refuses_text_or_settings_that_have_changed(
    small: Callable[..., Config], tmp_path: Path, text: Path
) -> None:
    run, copied = tmp_path / "run", tmp_path / "text"
    shutil.copytree(text, copied)
    keep = ("training.checkpoint_every=10", "training.keep_checkpoints=2")
    start(small(f"data.source={copied}", *keep), run, quiet=True)
    died(run)
    settings = (run / "config.yaml").read_text()
    before, _, teacher = settings.partition("teacher:")
    (run / "config.yaml").write_text(before + "teacher:" + teacher.replace("enabled: true", "enabled: false", 1))
    with pytest.raises(InputError, match=r"teacher\.enabled is false, not true"):
        resume(run, quiet=True)
    (run / "config.yaml").write_text(settings)
    (copied / "3.txt").write_text("something else entirely, " * 200)
    with pytest.raises(InputError, match=r"text of data\.source has changed"):
        resume(run, quiet=True)
    with pytest.raises(InputError, match="text has changed"):
        evaluate_run(run)


def test_a_run_that_died_before_its_summary_is_finished_by_resume(small: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole = start(small(), run, quiet=True)
    (run / "summary.json").unlink()
    again = resume(run, quiet=True)
    assert again["validation_loss"] == whole["validation_loss"]
    assert again["finished"]


def test_a_checkpoint_that_cannot_be_written_is_named(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsae.runs.checkpoint.save_file", full)
    with pytest.raises(InputError, match=r"cannot be written.*No space left"):
        start(small(), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    assert metrics(tmp_path / "run")[-1]["step"] == 20  # what was measured is kept
    assert resume(tmp_path / "run", quiet=True)["finished"]


def test_the_teachers_operations_follow_its_storage(small: Callable[..., Config], tmp_path: Path) -> None:
    spent = {}
    for storage in ("masked", "union", "dense"):
        config = small(f"teacher.storage={storage}", "topology.every=5")
        spent[storage] = start(config, tmp_path / storage, quiet=True)["train_flops_by_part"]["teacher"]
    assert spent["masked"] < spent["union"] < spent["dense"]


def test_resume_refuses_what_is_finished_or_absent(small: Callable[..., Config], tmp_path: Path) -> None:
    start(small(), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="is finished"):
        resume(tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="no such directory"):
        resume(tmp_path / "nothing", quiet=True)


def test_ctrl_c_saves_and_resume_finishes(text: Path, tmp_path: Path) -> None:
    """The real command, a real signal, the exit code of a stop, and the same end as an unbroken run."""
    settings = [
        f"data.source={text}", f"data.cache={tmp_path / 'cache'}", "data.tokenizer_vocab=300", "model.layers=1",
        "model.width=32", "model.heads=2", "model.context=32", "training.batch_size=2",
        "training.validation_sequences=4", "tracking.sample_tokens=5", "topology.every=20", "training.threads=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "sparsae", "train", "--steps", "160", "--out", str(tmp_path / "run")]
    command += [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or '"kind": "train"' not in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    done = subprocess.run(
        [sys.executable, "-m", "sparsae", "train", "--resume", str(tmp_path / "run"), "--json", "-"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    summary = json.loads(done.stdout)
    assert summary["finished"]
    assert summary["steps"] == 160
    assert (tmp_path / "run" / "report.html").is_file()
