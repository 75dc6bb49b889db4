"""Training on a GPU: the numbers of the CPU, by every rule, and a resumption that changes none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.config.load import resolve
from sparsae.train import run
from tests.golden import RECORDED, columns_of, first_difference, record, recorded, settings_of
from tests.support.runs import stopped_at, weights, write_text

# Relative, of float64.
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_text(path / "text")
    return path


# Of each rule and kind of teacher one; `tests/train/test_golden.py` has them all.
LEFT_OUT = {"static", "set", "gse", "gse-graest", "gmp", "granet", "sparsae-one"}
CASES = [case for case in RECORDED if case not in LEFT_OUT]


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_numbers_that_it_has_on_the_cpu(case: str, folder: Path) -> None:
    found = record(case, folder / "text", folder, device="cuda")
    assert first_difference(recorded(case), found, TOLERANCE) is None


@pytest.mark.parametrize(("case", "precision"), [("sparsae-guided", "bfloat16"), ("gmp", "float32")])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(case: str, precision: str, folder: Path) -> None:
    method, overrides = settings_of(case, folder / "text", folder / "cache")
    overrides += ["training.device=cuda", f"training.precision={precision}", "training.checkpoint_every=10"]
    config = resolve(None, "demo", method, overrides)
    whole, parts = folder / f"whole-{case}-{precision}", folder / f"parts-{case}-{precision}"
    run.start(config, whole, quiet=True)
    with stopped_at(23):
        assert not run.start(config, parts, quiet=True)["finished"]
    assert run.resume(parts, quiet=True)["finished"]
    assert weights(whole) == weights(parts)
    assert first_difference(columns_of(whole), columns_of(parts)) is None
