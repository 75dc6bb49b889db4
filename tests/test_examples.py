"""The examples run as they stand, each in a process of its own, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the output of each must hold.
SAYS = {
    "accelerate_loop": r"1,638 connections, \d+ updates of the topology, loss 0.*\nstopped at epoch 10 .*bit for bit",
    "export": r"9\d% of a layer is zero; files: .*model\.safetensors.*topology\.safetensors",
    "hf_trainer": r"(\d+ connections replaced\n)+(.*\n)*stopped at step 30 .*bit for bit\n(.*\n)*counts on with 8",
    "lightning_trainer": r"3,277 connections, \d+ updates(.*\n)*stopped at epoch 10 .*bit for bit\n(9[5-9]|100)%",
    "own_loop": r"replaced, loss(.*\n)*3,277 connections; (9[5-9]|100)% of new points are right",
    "own_observer": r"^best validation loss \d\.\d{4} at step \d+\n$",
    "own_rule": r"temperature 0\.0: \d\d+ .*\ntemperature 0\.5: \d\d+ connections moved",
    "own_term": r"(step \d+: spread of the candidates \[.*\], taken: number \d\n){7}",
    "resume": r"the same \d+ tensors, bit for bit",
}


def run(*command: str, folder: Path, **environment: str) -> str:
    """The output of a command in a directory of its own, with this checkout's package and no network."""
    settings = {"OMP_NUM_THREADS": "1", "SPARSAE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_and_does_what_it_says(example: Path, tmp_path: Path) -> None:
    assert re.search(SAYS[example.stem], run(sys.executable, str(example), folder=tmp_path))


@pytest.mark.parametrize("name", ["noisy", "fan_in_spread"])
def test_the_program_takes_them_by_name(name: str, tmp_path: Path) -> None:
    files = os.pathsep.join(str(ROOT / "examples" / f"own_{what}.py") for what in ("rule", "term"))
    printed = run(sys.executable, "-m", "sparsae", "train", "--method", "sparsae-guided", "--print-config",
                  *(("--method", name) if name == "noisy" else ("--set", f"topology.proxy.terms.{name}.weight=0.5")),
                  folder=tmp_path, SPARSAE_IMPORT=files)  # fmt: skip
    assert {"noisy": "temperature: 0.5", "fan_in_spread": "fan_in_spread:"}[name] in printed
