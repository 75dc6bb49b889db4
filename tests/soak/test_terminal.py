"""What commands leave on a terminal: lines of this program alone, none of the libraries that it stands on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsae.train.run import start
from tests.support.runs import config_of, write_text

pytestmark = pytest.mark.soak


def test_commands_that_read_and_write_models_of_transformers_say_what_they_do_alone(tmp_path: Path) -> None:
    """No bars and no warnings of transformers and torchao, and no advice for those who hold the model in Python."""
    wide = ["data.tokenizer_vocab=400", "model.width=16", "model.heads=2"]  # most weights are embeddings
    start(config_of(write_text(tmp_path / "text"), tmp_path / "cache", *wide), tmp_path / "run", quiet=True)
    run, text = str(tmp_path / "run"), str(tmp_path / "text")
    commands = [["export", run, "--to", f"{tmp_path}/{form}", "--format", form] for form in ("dense", "sparse")]
    commands += [["check", "sparsity", f"{tmp_path}/sparse", "--data", text, "--max-tokens", "100"]]
    commands += [
        ["evaluate", run],
        ["train", "--from", f"{tmp_path}/dense", "--out", f"{tmp_path}/more", "--steps", "2"],
    ]
    commands[-1] += ["--set", f"data.source={text}", "--set", f"data.cache={tmp_path}/cache"]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "sparsae", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        noise = ("Loading weights", "model shards", "torchao", "it/s", "W1", "Warning", "summary(model)")
        assert not [word for word in noise if word in done.stderr + done.stdout], done.stderr
