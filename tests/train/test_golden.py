"""Short runs of every method have the numbers that they had when they were recorded; see golden.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.config.load import resolve
from tests.golden import CASES, RECORDED, RECORDS, difference_from_record, recorded, settings_of


@pytest.mark.slow
@pytest.mark.parametrize("case", RECORDED)
def test_a_run_has_its_recorded_numbers(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert difference_from_record(case, tmp_path_factory.getbasetemp() / "golden") is None


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_takes_a_case(case: str, tmp_path: Path) -> None:
    method, overrides = settings_of(case, tmp_path, tmp_path)
    idle: dict[str, str] = {}
    resolve(None, "demo", method, overrides, on_idle=idle.update)
    assert idle == {}  # the program refuses them


def test_every_record_is_of_a_case_in_which_something_moves() -> None:
    assert {path.stem for path in RECORDS.glob("*.json")} == set(RECORDED)
    for case in RECORDED:
        columns = recorded(case)
        assert len(columns["train.loss"]) == 60
        moves = sum(columns["topology.swaps"]) > 0 or len(set(columns["train.nnz"])) > 1
        assert moves == (CASES[case][0] not in ("dense", "static"))
