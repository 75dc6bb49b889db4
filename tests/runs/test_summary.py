"""summary.json and sample.json: written and read by one class each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.load import resolve
from sparsae.config.text import dump
from sparsae.core.record import decode, encode
from sparsae.errors import InputError
from sparsae.files import to_json
from sparsae.runs.directory import RunDirectory
from sparsae.runs.summary import Sample, Summary, read_summary
from tests.support.records import records, summary_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@given(st.sampled_from([Summary, Sample]).flatmap(records))
def test_they_are_read_as_they_were_written(record: Summary | Sample) -> None:
    text = to_json(encode(record))
    again = decode(type(record), json.loads(text), "here")
    assert to_json(encode(again)) == text
    if "null" not in text:
        assert again == record


@pytest.mark.parametrize("file", sorted(RESULTS.glob("books-15m/*.json")), ids=lambda file: file.stem)
def test_a_summary_of_an_earlier_version_is_read(file: Path) -> None:
    content = json.loads(file.read_text())
    read = encode(read_summary(file))
    assert {key: read[key] for key in content} == content
    assert read.keys() - content.keys() <= {
        "test_loss", "study_flops", "diverged", "started_from", "extensions", "metrics", "ranks",
        "steps_skipped", "changes", "flops_per_second", "mfu",
    }  # fmt: skip


def test_a_summary_of_this_version_is_read() -> None:
    content = json.loads((RESULTS / "demo.json").read_text())["summary"]
    read = encode(decode(Summary, content, "demo.json"))
    assert read == {"ranks": 1, "steps_skipped": 0, "changes": [], "flops_per_second": None, "mfu": None} | {
        key: value for key, value in content.items() if key not in ("run_id", "sha256")
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finished": "yes"}, "finished: must be true or false, not 'yes'"),
        ({"nnz": 1.5}, "nnz: must be a whole number, not 1.5"),
        ({"seconds_by_part": {"train": "long"}}, "seconds_by_part.train: must be a number or null, not 'long'"),
        ({"diverged": {"step": 3}}, "diverged.reason: is missing"),
        ({"extensions": [{"step": 1}]}, r"extensions\[0\].previous_steps: is missing"),
    ],
)
def test_a_summary_that_is_none_is_told_by_file_and_field(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config_file.write_text(dump(resolve()))
    run.summary.write_text(to_json({**encode(summary_of()), **change}))
    with pytest.raises(InputError, match=rf"summary\.json: {said}; the file is damaged"):
        run.read_summary()
    assert run.read_sample() is None
