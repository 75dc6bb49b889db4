"""Rows of metrics.jsonl: written and read by one class a kind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.errors import InputError
from sparsae.files import to_json
from sparsae.registry import TERMS
from sparsae.runs.directory import RunDirectory
from sparsae.runs.metrics import MetricsWriter, steps_done
from sparsae.runs.rows import KINDS, Row, TopologyRow, TrainRow, ValidationRow, read_row
from sparsae.search.rows import CandidateRow
from tests.support.records import candidate_row, records, topology_row, train_row, validation_row


@given(st.sampled_from(sorted(KINDS)).flatmap(lambda name: records(KINDS[name])))
def test_every_row_is_read_as_it_was_written(row: Row) -> None:
    line = to_json(row.to_dict())
    again = read_row(json.loads(line), "here")
    assert type(again) is type(row)
    assert to_json(again.to_dict()) == line
    assert read_row(json.loads(to_json(again.to_dict())), "here").to_dict() == again.to_dict()
    if "null" not in line:
        assert again == row


def test_every_class_of_rows_has_its_kind() -> None:
    assert set(KINDS.values()) == set(Row.__subclasses__())
    assert all(kind.kind == name for name, kind in KINDS.items())


def test_no_term_can_be_called_as_a_field_of_its_row_is() -> None:
    written = candidate_row(1.0, validation_cross_entropy=1.0)
    assert frozenset(topology_row(1, current=written).to_dict()["current"]) == TERMS.reserved


def test_what_a_rule_adds_stands_where_it_always_stood() -> None:
    row = topology_row(3, numbers={"drop_fraction": 0.3, "gene.ramp": None, "remark": "odd"})
    keys = list(row.to_dict())
    assert keys[keys.index("current") + 1 : keys.index("nnz")] == ["drop_fraction", "gene.ramp", "remark"]
    again = read_row(row.to_dict(), "here")
    assert again == row
    assert isinstance(again, TopologyRow)
    assert again.number("drop_fraction") == 0.3
    assert all(map(math.isnan, (again.number("gene.ramp"), again.number("remark"), again.number("none"))))


def test_the_best_candidate_is_scored_and_the_taken_one_was_chosen() -> None:
    scored, better, none = candidate_row(2.0), candidate_row(1.0, "shift"), candidate_row(math.nan)
    row = topology_row(1, candidates=(none, scored, better))
    assert row.best == better
    assert topology_row(1, candidates=(none,)).best is None
    assert (row.taken, topology_row(1, accepted=True).taken) == (None, None)
    assert topology_row(1, accepted=True, chosen=1, candidates=(none, scored)).taken == scored
    assert CandidateRow(proposer="x", swaps=1, score=2.0, rejected=None).is_scored


def test_what_earlier_versions_did_not_write_is_filled_in() -> None:
    row = topology_row(1).to_dict()
    del row["skipped"]
    assert read_row(row, "here") == topology_row(1)


LINES = {
    "no kind": ({"step": 1}, "kind: no row of metrics is null; one of: train"),
    "another kind": (
        train_row(1).to_dict() | {"kind": "trane"},
        "kind: no row of metrics is 'trane'; did you mean tra",
    ),
    "an odd kind": ({"kind": [1]}, r"kind: no row of metrics is \[1\]"),
    "a number is text": (train_row(1).to_dict() | {"loss": "low"}, "loss: must be a number or null, not 'low'"),
    "a count is none": (validation_row(1).to_dict() | {"tokens": None}, "tokens: must be a whole number, not null"),
    "a step is text": (validation_row(1).to_dict() | {"step": "1"}, "step: must be a whole number, not '1'"),
    "a field is missing": ({"kind": "diverged", "step": 1, "tokens": 2}, "reason: is missing"),
    "an age is missing": (topology_row(1).to_dict() | {"age": {"mean": 1, "median": 1}}, "age.max: is missing"),
    "layers are a list": (topology_row(1).to_dict() | {"layers": [1]}, r"layers: must be an object, not \[1\]"),
    "a layer is none": (
        topology_row(1).to_dict() | {"layers": {"a.b": None}},
        "layers.a.b: must be an object, not null",
    ),
    "none was chosen": (topology_row(1).to_dict() | {"chosen": 2}, "chosen: must be one of 0 candidates, not 2"),
    "a candidate": (
        topology_row(1, candidates=(candidate_row(1.0),)).to_dict() | {"candidates": [{"proposer": "x"}]},
        r"candidates\[0\].swaps: is missing",
    ),
}


@pytest.mark.parametrize(("content", "said"), LINES.values(), ids=LINES)
def test_a_row_that_is_none_is_told_by_file_line_and_field(
    content: dict[str, object], said: str, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text(f"{json.dumps(train_row(1).to_dict())}\n{json.dumps(content)}\n")
    with pytest.raises(InputError, match=rf"metrics\.jsonl: line 2: {said}") as caught:
        run.read_metrics(Row)
    assert "\n" not in str(caught.value)


def test_rows_of_the_kinds_that_are_wanted_are_read(tmp_path: Path) -> None:
    run, rows = RunDirectory(tmp_path), [validation_row(0), topology_row(0), train_row(4), validation_row(4)]
    with MetricsWriter(run.metrics) as writer:
        for row in rows:
            writer.write(row)
    assert run.read_metrics(Row) == rows
    assert run.read_metrics(ValidationRow) == [rows[0], rows[3]]
    assert run.read_metrics(TrainRow, TopologyRow) == rows[1:3]


def test_the_steps_of_a_run_are_read_off_its_end(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert steps_done(run.metrics) == 0
    with MetricsWriter(run.metrics) as writer:
        for step in (1, 2, 3):
            writer.write(train_row(step))
    assert steps_done(run.metrics) == 3
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "step": 4')
    assert steps_done(run.metrics) == 3
