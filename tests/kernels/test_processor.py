"""The processor's arithmetic: one place sets it up, for every thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsae
from sparsae.kernels.processor import set_up_processor
from sparsae.train.run import start
from tests.support.runs import config_of, write_text

# A number that no float32 of full precision is, and its sum over so many of them that all threads take part.
PROGRAM = """
import torch
{before}
tiny = torch.full((1 << 20,), 1e-30) * 1e-10
print(torch.get_num_threads(), int((tiny != 0).sum()))
"""
SET_UP = "from sparsae.kernels.processor import set_up_processor; set_up_processor({threads})"


def flushes() -> bool:
    return float(torch.tensor([1e-30]) * 1e-10) == 0.0


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("torch.set_num_threads(3)", f"3 {1 << 20}"),
        (SET_UP.format(threads=3), "3 0"),
        ("torch.set_num_threads(3); " + SET_UP.format(threads=None), "3 0"),
    ],
)
def test_numbers_too_small_to_be_normal_are_zeros_in_every_thread(before: str, expected: str) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps such numbers")
    program = [sys.executable, "-c", PROGRAM.format(before=before)]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_a_run_sets_the_processor_up(tmp_path: Path) -> None:
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", "training.steps=2", method="static")
    start(config, tmp_path / "run", quiet=True)
    assert flushes() == torch.set_flush_denormal(True)


def test_nothing_else_sets_it_up() -> None:
    package = Path(sparsae.__file__).parent
    setters = ("set_num_threads(", "set_flush_denormal(")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(setter in path.read_text(encoding="utf-8") for setter in setters)
    }
    assert found == {"kernels/processor.py"}
    assert set_up_processor.__module__ == "sparsae.kernels.processor"
