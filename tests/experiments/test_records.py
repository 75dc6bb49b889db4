"""results.json: written and read by the classes of its kind, of this version and of earlier ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.core.record import decode, encode
from sparsae.errors import InputError
from sparsae.experiments.compare import record as compare
from sparsae.experiments.compare.page import body
from sparsae.experiments.coordinates import record as coordinates
from sparsae.experiments.jobs import Failure, outcome
from sparsae.experiments.page import write_page
from sparsae.experiments.registry import KINDS, kind_in
from sparsae.experiments.transfer import record as transfer
from sparsae.files import to_json
from tests.support.records import records, summary_of
from tests.support.results import compare_results, compare_row

RESULTS = Path(__file__).parents[2] / "docs" / "results"
KEPT = [
    file
    for file in sorted(RESULTS.glob("*/*.json"))
    if isinstance(content := json.loads(file.read_text()), dict) and "plan" in content
]


@given(st.sampled_from([compare.Results, transfer.Results, coordinates.Results]).flatmap(records))
def test_results_are_read_as_they_were_written(results: Any) -> None:
    text = to_json(encode(results))
    again = decode(type(results), json.loads(text), "here")
    assert to_json(encode(again)) == text
    if "null" not in text:
        assert again == results


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_results_that_the_repository_keeps_are_read_and_lose_nothing_that_is_shown(file: Path) -> None:
    content = json.loads(file.read_text())
    read = encode(kind_in(content, str(file)).read(json.loads(file.read_text()), str(file)))

    def kept(now: Any, then: Any, place: str) -> None:
        if isinstance(then, dict) and not place.startswith(".plan"):
            for key in now.keys() & then.keys():
                kept(now[key], then[key], f"{place}.{key}")
        elif isinstance(then, list):
            assert len(now) == len(then), place
            for index, (mine, other) in enumerate(zip(now, then, strict=True)):
                kept(mine, other, f"{place}[{index}]")
        elif not place.endswith(".verdict") and not place.startswith(".plan"):  # of p values that are adjusted
            assert now == then, place

    kept(read, content, "")
    assert content.keys() <= read.keys()
    if file.parent.name == "books-2m":  # of this version
        assert to_json(read, indent=1) + "\n" == file.read_text()


def test_a_kind_reads_what_it_wrote() -> None:
    rows = [compare_row("static", 0, 3.0), compare_row("set", 0, 0.0, diverged=True)]
    results = compare_results(rows)
    assert KINDS["comparison"].read(json.loads(to_json(encode(results))), "here") == results


def results_file(tmp_path: Path, change: dict[str, Any]) -> Path:
    content = encode(compare_results([compare_row("static", 0, 3.0)])) | change
    (tmp_path / "results.json").write_text(to_json(content))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [{"method": "static"}]}, r"rows\[0\].seed: is missing"),
        ({"rows": 3}, "rows: must be a list, not 3"),
        ({"judged_by": "loss"}, "judged_by: must be 'test_loss' or 'validation_loss', not 'loss'"),
        ({"plan": {"preset": 3, "tuning": {}}}, "plan: preset: must be text, not 3"),
        ({"plan": None}, "no version of sparsae wrote this"),
        ({"complete": None}, "complete: must be true or false, not null"),
        ({"conclusions": [{"sparsity": 0.9}]}, r"conclusions\[0\].winner: is missing"),
    ],
)
def test_results_that_are_none_are_told_by_file_and_field(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"results\.json: {said}") as caught:
        write_page(results_file(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_a_page_of_results_whose_runs_go_on_is_written(tmp_path: Path) -> None:
    """Of what was tuned and has no run yet."""
    look = compare.Look(setting="training.learning_rate", around={}, values=(1.0, 2.0), added=(), best=1.0,
                        losses=(3.0, None))  # fmt: skip
    tuned = compare.TuningRow(
        method="rigl", sparsity=0.9, learning_rate=1.0, settings={"training.learning_rate": 1.0}, at_edge=True,
        edges=("training.learning_rate",), train_flops=1, looks=(look,), trials=(),
    )  # fmt: skip
    results = compare_results([compare_row("static", 0, 3.0)], complete=False, tuning=(tuned,))
    assert "rigl" in body(results, tmp_path)


def test_an_outcome_is_that_of_a_finished_run_or_of_one_that_diverged(tmp_path: Path) -> None:
    assert outcome(tmp_path) is None
    (tmp_path / "summary.json").write_text(to_json(encode(summary_of(finished=False))))
    assert outcome(tmp_path) is None
    (tmp_path / "summary.json").write_text(to_json(encode(summary_of())))
    assert outcome(tmp_path) == summary_of()
    (tmp_path / "diverged.json").write_text('{"diverged": true, "steps": 3, "train_flops": 7, "message": "so"}')
    assert outcome(tmp_path) == Failure(steps=3, train_flops=7, message="so")
    (tmp_path / "diverged.json").write_text('{"diverged": true}')
    with pytest.raises(InputError, match=r"diverged\.json: steps: is missing"):
        outcome(tmp_path)
