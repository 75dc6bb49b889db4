"""A command's user reads what the command says, not what a library deprecates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = """
import sys
from sparsae.cli import main
for line in sys.stdin:
    code = main(line.split())
    if code:
        sys.exit(code)
"""
SMALL = (
    "data.tokenizer_vocab=300 model.width=32 model.heads=2 model.layers=1 model.context=32 training.steps=4 "
    "training.batch_size=4 training.validation_sequences=4 training.device=cpu"
)


@pytest.mark.slow
def test_no_command_prints_a_deprecation(tmp_path: Path) -> None:
    for i in range(12):  # documents
        lines = [f"item {j} of list {i} has {j % 7} parts and {i % 3} colours" for j in range(60)]
        (tmp_path / f"{i}.txt").write_text("\n".join(lines))
    settings = [f"data.source={tmp_path}/*.txt", f"data.cache={tmp_path}/cache", *SMALL.split()]
    commands = []
    for family in ("gpt2", "llama"):
        run = tmp_path / family
        commands += [
            f"train --out {run} " + " ".join(f"--set {setting}" for setting in [*settings, f"model.family={family}"]),
            f"evaluate {run}",
            f"generate {run} --prompt item --tokens 3",
            f"export {run} --to {run}-exported",
        ]
    # A process of its own: a library says such a thing once, and pytest would take its warnings.
    done = subprocess.run([sys.executable, "-c", COMMANDS], input="\n".join(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines() + done.stdout.splitlines()
    assert [line for line in said if "deprecat" in line.lower() or "Failed to load" in line] == []
