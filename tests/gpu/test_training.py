"""Training on a GPU: the numbers of the CPU, by every rule, and a resumption that changes none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsae import Sparsifier, SparsifierConfig
from sparsae.config.load import resolve
from sparsae.train import run
from tests.golden import RECORDED, columns_of, difference_from_record, first_difference, settings_of
from tests.support.loops import mlp
from tests.support.runs import stopped_at, weights, write_text

# Of each rule and kind of teacher one; `tests/train/test_golden.py` has them all.
LEFT_OUT = {"static", "set", "gse", "gse-graest", "gmp", "granet", "sparsae-one"}
CASES = [case for case in RECORDED if case not in LEFT_OUT]


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_numbers_that_it_has_on_the_cpu(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert difference_from_record(case, tmp_path_factory.getbasetemp() / "golden", "cuda") is None


@pytest.mark.parametrize(("case", "precision"), [("sparsae-guided", "bfloat16"), ("gmp", "float32")])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(case: str, precision: str, tmp_path: Path) -> None:
    method, overrides = settings_of(case, write_text(tmp_path / "text"), tmp_path / "cache")
    overrides += ["training.device=cuda", f"training.precision={precision}", "training.checkpoint_every=10"]
    config = resolve(None, "demo", method, overrides)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run.start(config, whole, quiet=True)
    with stopped_at(23):
        assert not run.start(config, parts, quiet=True)["finished"]
    assert run.resume(parts, quiet=True)["finished"]
    assert weights(whole) == weights(parts)
    assert first_difference(columns_of(whole), columns_of(parts)) is None


def test_a_model_that_is_moved_between_updates_tells_the_same() -> None:
    told = []
    for places in (("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cpu")):
        model, rows = mlp().to(places[0]), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology={"rule": "set", "every": 3}))
        for step in range(18):
            if step == 8:
                model.to(places[1])
            optimizer.zero_grad()
            model(torch.ones(4, 24, device=next(model.parameters()).device)).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
            if (update := sparsifier.after_step()) is not None:
                rows.append([update.row[name] for name in ("hamming_start", "hamming_last", "itop_rate", "age")])
        told.append(rows)
    assert len(told[0]) == 6
    assert told[0] == told[1] == told[2]
