"""What becomes of memory that a training step frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from sparsae.train.memory import keep_freed_memory
if {keep}:
    keep_freed_memory(torch.device("cpu"))
def step():
    torch.empty(16, 1024, 1024).fill_(1.0)
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of glibc")
def test_kept_memory_is_not_given_out_page_by_page_again() -> None:
    # 64 MB is above every threshold that glibc adapts by itself. An aligned buffer finds its place after some steps.
    faults = {}
    for keep in (False, True):
        program = PROGRAM.format(keep=keep)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
        faults[keep] = int(done.stdout)
    assert faults[True] < 500 < faults[False]
