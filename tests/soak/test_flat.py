"""Memory, open files and threads stay where they are over thousands of updates and hundreds of checkpoints."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

from sparsae.train.loop import Trainer
from sparsae.train.passes import Passes
from sparsae.train.run import start
from tests.support.runs import config_of, write_text

pytestmark = pytest.mark.soak

UPDATES = int(os.environ.get("SPARSAE_UPDATES", "4000"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("beside", [False, True], ids=["sync", "async"])
def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    torch.set_num_threads(1)
    text, seen = write_text(tmp_path / "text"), []
    stepping, steps = Trainer.stepping, UPDATES * 10 // 9  # the last tenth of a run moves nothing

    def watched(self: Trainer) -> Passes[None]:
        yield from stepping(self)
        if self.step % (steps // 20) == 0:
            gc.collect()
            files = len(list(Path("/proc/self/fd").iterdir()))
            seen.append((resident() / 2**20, files, threading.active_count(), len(gc.get_objects())))

    monkeypatch.setattr(Trainer, "stepping", watched)
    config = config_of(
        text, tmp_path / "cache", f"training.steps={steps}", "topology.every=1", "training.checkpoint_every=20",
        "training.log_every=500", f"training.checkpoint_async={str(beside).lower()}", "teacher.enabled=true",
    )  # fmt: skip
    summary = start(config, tmp_path / "run", quiet=True)
    assert summary["topology_updates"] >= UPDATES - 1
    # The first tenth is that of caches and allocators.
    memory, files, threads, objects = zip(*seen[2:], strict=True)
    print(
        f"{UPDATES} updates: memory {memory[0]:.1f} to {memory[-1]:.1f} MiB, {files[-1]} files, {threads[-1]} threads"
    )
    assert max(memory[9:]) - max(memory[:9]) < 8
    assert max(files) <= files[0] + 2
    assert max(threads) == min(threads)
    assert objects[-1] < objects[0] + 2000
