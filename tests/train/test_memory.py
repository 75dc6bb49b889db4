"""What becomes of memory that a training step frees."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsae import sparse_layers, sparsify
from sparsae.train.memory import state_bytes

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


def test_gradients_in_one_storage_count_with_their_own_bytes() -> None:

    layers = sparse_layers(sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), 0.5))
    both = torch.cat([torch.ones_like(layer.values) for layer in layers.values()])
    first, second = layers.values()
    first.values.grad, second.values.grad = both[: len(first.values)], both[len(first.values) :]
    optimizer = torch.optim.SGD([layer.values for layer in layers.values()], lr=0.1)
    assert state_bytes(layers, optimizer, None)["gradients"] == both.nbytes
