"""All rules on two ranks and on four, for long, with ties, and the program as torchrun starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sparsae.core.ranks import ranks
from sparsae.core.topology import digest
from sparsae.errors import RanksError
from sparsae.search.sparsifier import Sparsifier
from tests.support.ranks import assert_same, joined, on_ranks, train
from tests.support.runs import rows, write_text
from tests.support.sections import SECTIONS

pytestmark = pytest.mark.soak

SETTINGS = ["data.tokenizer_vocab=300", "model.layers=1", "model.width=32", "model.heads=2", "model.context=16",
            "training.batch_size=4", "training.validation_sequences=4", "training.device=cpu",
            "tracking.sample_tokens=4", "topology.every=4"]  # fmt: skip


def _as_one(rank: int, count: int, store: str, section: str) -> None:
    torch.set_num_threads(1)
    alone = [train(section, 50, teacher=teacher) for teacher in (False, True)]
    with joined(rank, count, store):
        for teacher, expected in zip((False, True), alone, strict=True):
            assert_same(train(section, 50, teacher=teacher), expected)


def _never_apart(rank: int, count: int, store: str, section: str, steps: int) -> None:
    torch.set_num_threads(1)
    with joined(rank, count, store):
        trained = train(section, steps, ties=True, dtype=torch.float32)
        assert len(trained.updates) >= min(steps // 3, 1)
        found = b"".join(digest(indices) for indices in trained.topologies().values())
        values = b"".join(digest(p.detach()) for p in trained.model.parameters())
        ranks().require_same({"the topologies": found, "the values": values})


def _bit(rank: int, count: int, store: str) -> None:
    def flip(step: int, sparsifier: Sparsifier) -> None:
        if step == 500 and rank == count - 1:
            layer = next(iter(sparsifier._layers.values()))
            for indices in (layer.topology.indices, layer.indices):
                indices.numpy()[0] ^= 1

    torch.set_num_threads(1)
    with joined(rank, count, store), pytest.raises(RanksError, match=f"on rank {count - 1} as on rank 0"):
        train("set", 1000, look=flip)


@pytest.mark.parametrize("section", SECTIONS)
def test_two_ranks_train_as_one(section: str, tmp_path: Path) -> None:
    on_ranks(_as_one, tmp_path, section)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("section", SECTIONS)
def test_no_rank_leaves_the_others_in_a_thousand_updates_with_ties(section: str, count: int, tmp_path: Path) -> None:
    on_ranks(_never_apart, tmp_path, section, 2000, count=count)


def test_a_flipped_bit_ends_four_ranks(tmp_path: Path) -> None:
    on_ranks(_bit, tmp_path, count=4)


def _torchrun(folder: Path, *arguments: str) -> list[str]:
    settings = [f"data.source={folder / 'text'}", f"data.cache={folder / 'cache'}", *SETTINGS]
    given = [part for setting in settings for part in ("--set", setting)] if "--resume" not in arguments else []
    launch = ["--standalone", "--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m", "sparsae"]
    return [sys.executable, "-m", "torch.distributed.run", *launch, "train", *arguments, *given]


def _run(command: Sequence[str], code: int | None = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert code is None or done.returncode == code, done.stderr
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_trains_stops_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    write_text(tmp_path / "text")
    _run(_torchrun(tmp_path, "--preset", "demo", "--steps", "400", "--out", str(tmp_path / "whole")))
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"], summary["finished"]) == (2, 400, True)
    assert (tmp_path / "whole" / "report.html").is_file()
    out = tmp_path / "stopped"
    launcher = subprocess.Popen(_torchrun(tmp_path, "--preset", "demo", "--steps", "400", "--out", str(out)))
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.stat().st_size < 2000:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(number)
    began = time.monotonic()
    launcher.wait(60)
    assert time.monotonic() - began < 25
    stopped = json.loads((out / "summary.json").read_text())
    assert not stopped["finished"]
    assert list((out / "checkpoints").glob(f"step-*{stopped['steps']}"))
    _run(_torchrun(tmp_path, "--resume", str(out)))
    assert rows(out) == rows(tmp_path / "whole")


def test_a_killed_rank_ends_the_other_with_a_line(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    out = tmp_path / "run"
    with subprocess.Popen(
        _torchrun(tmp_path, "--preset", "demo", "--steps", "100000", "--out", str(out)),
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        metrics = out / "metrics.jsonl"
        while not metrics.is_file() or metrics.stat().st_size < 2000:
            assert launcher.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        second = next(c for c in children if b"RANK=1" in Path(f"/proc/{c}/environ").read_bytes().split(b"\0"))
        began = time.monotonic()
        os.kill(int(second), signal.SIGKILL)
        stderr = launcher.communicate(timeout=60)[1]
    assert time.monotonic() - began < 60
    assert launcher.returncode
    assert "rank 1 has ended without a word" in stderr
