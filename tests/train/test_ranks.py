"""A run that several ranks train together is the run that one trains, and its directory is written by the first."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.errors import DivergedError, InputError, RanksError
from sparsae.train.joining import joined
from sparsae.train.run import resume, start
from tests.support.faults import not_finite
from tests.support.ranks import free_port, launched, on_ranks
from tests.support.runs import config_of, rows, stopped_at, write_text

# A teacher, scores and burn-in, with layers whose numbers of connections change; and averages over steps.
METHODS: dict[str, list[str]] = {
    "sparsae-written": ["teacher.start=0.1", "teacher.warmup_fraction=0.2", "training.accumulation=2"],
    "sparsae-guided": ["topology.window=3"],
}


def _runs(rank: int, count: int, store: str, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    launched(rank, count, port)
    message = "^the disk is full$" if rank == 1 else "^rank 1 ended: the disk is full$"
    with pytest.raises(InputError if rank == 1 else RanksError, match=message):
        _runs_until_an_error(rank, folder)
    os._exit(0)  # the end of a process closes its connections


def _runs_until_an_error(rank: int, folder: Path) -> None:
    with joined():
        for method, settings in METHODS.items():
            start(_config(folder, method, settings), folder / f"{method}-two", quiet=True)
        config = _config(folder, "sparsae-guided", METHODS["sparsae-guided"])
        for name in ("stopped", "handed-over"):
            # A signal to one, of which the other learns.
            with stopped_at(7) if rank == 1 else nullcontext():
                summary = start(config, folder / name, quiet=True)
            assert (summary["finished"], summary["steps"]) == (False, 7)
        assert resume(folder / "stopped", quiet=True)["finished"]
        poison = lambda steps: not_finite("gradient", steps) if rank == 1 else nullcontext()  # noqa: E731
        with poison({3, 8}):
            summary = start(_config(folder, "static", []), folder / "skipped", quiet=True)
        assert (summary["finished"], summary["steps_skipped"]) == (True, 2)
        settings = ["training.skip_limit=1", "training.checkpoint_every=4"]
        with poison({6, 7}), pytest.raises(DivergedError, match="the gradient's norm is nan after step 6"):
            start(_config(folder, "static", settings), folder / "diverged", quiet=True)
        with pytest.raises(InputError, match=r"training\.batch_size 3 cannot be divided among 2 ranks"):
            start(_config(folder, "static", ["training.batch_size=3"]), folder / "odd", quiet=True)
        if rank == 1:
            raise InputError("the disk is full")
        start(_config(folder, "static", []), folder / "failed", quiet=True)


def _config(folder: Path, method: str, settings: list[str]) -> Any:
    return config_of(folder / "text", folder / "cache", *settings, method=method)


@pytest.mark.slow
def test_two_ranks_train_the_run_of_one(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    one = {m: start(_config(tmp_path, m, s), tmp_path / m, quiet=True) for m, s in METHODS.items()}
    on_ranks(_runs, tmp_path, tmp_path, free_port())
    for method, summary in one.items():
        two = json.loads((tmp_path / f"{method}-two" / "summary.json").read_text())
        assert (summary["ranks"], two["ranks"]) == (1, 2)
        same = ["steps", "tokens", "nnz", "train_flops_by_part", "topology_updates_accepted", "finished"]
        assert {key: two[key] for key in same} == {key: summary[key] for key in same}
        assert two["validation_loss"] == pytest.approx(summary["validation_loss"], abs=1e-4)
        assert two["test_loss"] == pytest.approx(summary["test_loss"], abs=1e-4)
        expected, found = rows(tmp_path / method), rows(tmp_path / f"{method}-two")
        assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in expected]
        for mine, theirs in zip(found, expected, strict=True):
            if mine["kind"] == "train":
                assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
                assert mine["distillation"] == pytest.approx(theirs["distillation"], abs=1e-4)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "sparsae-guided-two")
    handed_over = resume(tmp_path / "handed-over", quiet=True)
    assert handed_over["validation_loss"] == pytest.approx(one["sparsae-guided"]["validation_loss"], abs=1e-4)
    assert not (tmp_path / "odd").exists()
    assert [row["step"] for row in rows(tmp_path / "skipped") if row["kind"] == "skipped"] == [3, 8]
    assert [path.name for path in (tmp_path / "diverged" / "checkpoints").iterdir()] == ["step-00000004"]
