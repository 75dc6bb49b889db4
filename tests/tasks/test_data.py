"""Tasks as they are published: every form of a row, splits by their files, and what is held out where none is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsae.errors import InputError
from sparsae.tasks.catalogue import TASKS, Example, task_named
from sparsae.tasks.data import read_task
from tests.support.faults import open_files
from tests.support.tasks import sentiment, write_lines

REAL = Path(os.environ.get("SPARSAE_EVAL", "/work/shared/data/eval"))

PASSAGE = {
    "text": "A dog barks.",
    "questions": [
        {"question": "Who?", "answers": [{"text": "a dog", "label": 1}, {"text": "a cat", "label": 0}]},
        {"question": "What?", "answers": [{"text": "it barks", "label": 1}]},
    ],
}
ROWS: list[tuple[str, dict[str, Any], list[Example]]] = [
    ("rte", {"sentence1": "a", "sentence2": "b", "label": "not_entailment"}, [Example((("a", "b"),), 1)]),
    ("rte", {"premise": "a", "hypothesis": "b", "label": 0}, [Example((("a", "b"),), 0)]),
    ("cola", {"sentence": "a", "label": 1}, [Example((("a",),), 1)]),
    ("wnli", {"sentence1": "a", "sentence2": "b", "label": "1"}, [Example((("a", "b"),), 1)]),
    ("qqp", {"question1": "a", "question2": "b", "label": "duplicate"}, [Example((("a", "b"),), 1)]),
    ("qnli", {"question": "a", "sentence": "b", "label": "entailment"}, [Example((("a", "b"),), 0)]),
    ("mnli", {"premise": "a", "hypothesis": "b", "label": "neutral"}, [Example((("a", "b"),), 1)]),
    ("boolq", {"question": "q", "passage": "p", "title": "t", "answer": True}, [Example((("p", "q"),), 1)]),
    ("boolq", {"question": "q", "passage": "p", "label": False}, [Example((("p", "q"),), 0)]),
    ("cb", {"premise": "a", "hypothesis": "b", "label": "neutral"}, [Example((("a", "b"),), 2)]),
    ("wic", {"word": "w", "sentence1": "a", "sentence2": "b", "label": 1}, [Example((("w", "a", "b"),), 1)]),
    (
        "copa",
        {"premise": "p", "choice1": "x", "choice2": "y", "question": "cause", "label": 1},
        [Example((("p What was the cause?", "x"), ("p What was the cause?", "y")), 1)],
    ),
    (
        "multirc",
        {"paragraph": "p", "question": "q", "answer": "a", "label": 1},
        [Example((("p", "q", "a"),), 1, "p\0q")],
    ),
    (
        "multirc",
        {"idx": 0, "passage": PASSAGE},
        [
            Example((("A dog barks.", "Who?", "a dog"),), 1, "A dog barks.\0Who?"),
            Example((("A dog barks.", "Who?", "a cat"),), 0, "A dog barks.\0Who?"),
            Example((("A dog barks.", "What?", "it barks"),), 1, "A dog barks.\0What?"),
        ],
    ),
]


@pytest.mark.parametrize(("name", "row", "examples"), ROWS)
def test_a_row_is_read_in_each_form(name: str, row: dict[str, Any], examples: list[Example]) -> None:
    assert list(TASKS[name].read(row, "here")) == examples


def test_every_task_is_read_in_some_form() -> None:
    # MRPC and SST-2 have the forms of WNLI and CoLA.
    assert {name for name, _, _ in ROWS} | {"mrpc", "sst2"} == set(TASKS)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("rte", {"sentence1": "a", "label": 0}, ["here", "sentence2 or hypothesis", "sentence1, label"]),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": 2}, ["here", "2", "entailment, not_entailment"]),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": -1}, ["here", "-1"]),
        ("rte", {"sentence1": "a", "sentence2": "b"}, ["here", "no label", "no answer"]),
        ("cola", {"sentence": 3, "label": 1}, ["here", "sentence is 3", "text"]),
        ("copa", {"premise": "p", "question": "why", "label": 0}, ["here", "'why'", "cause or effect"]),
        ("multirc", {"passage": {"text": "p"}}, ["here", "MultiRC"]),
        ("multirc", {"passage": None}, ["here", "MultiRC"]),
    ],
)
def test_a_row_of_something_else_is_refused(name: str, row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        list(TASKS[name].read(row, "here"))
    for word in words:
        assert word in str(raised.value)


def test_a_near_name_is_offered() -> None:
    with pytest.raises(InputError, match="did you mean boolq"):
        task_named("boolqa")


def test_what_is_held_out_is_the_same_in_any_order_and_keeps_premises_whole(tmp_path: Path) -> None:
    rows = [{"sentence1": f"premise {n // 3}", "sentence2": f"hypothesis {n}", "label": n % 2} for n in range(600)]
    write_lines(tmp_path / "one" / "rte" / "train.jsonl", rows)
    write_lines(tmp_path / "two" / "train.jsonl", rows[::-1])
    one, two = (read_task(TASKS["rte"], str(tmp_path / name)) for name in ("one", "two"))
    assert one.held_out
    assert set(one.validations) == {""}
    assert set(one.validations[""]) == set(two.validations[""])
    assert 30 < len(one.validations[""]) < 90
    assert len(one.train) + len(one.validations[""]) == 600
    assert {example.key for example in one.train}.isdisjoint(example.key for example in one.validations[""])


def test_splits_are_found_by_their_names(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"premise": f"p{n}", "hypothesis": "h", "label": n % 3} for n in range(12)]
    for shard in range(2):
        table = pyarrow.Table.from_pylist(rows[shard * 6 : shard * 6 + 6])
        (tmp_path / "mnli").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "mnli" / f"train-0000{shard}-of-00002.parquet")
    write_lines(tmp_path / "mnli" / "dev_matched.jsonl", rows[:2])
    write_lines(tmp_path / "mnli" / "validation_mismatched.jsonl", rows[:3])
    write_lines(tmp_path / "mnli" / "test_matched.jsonl", [{"premise": "unlabelled", "hypothesis": "h", "label": -1}])
    data = read_task(TASKS["mnli"], str(tmp_path))
    assert [example.texts[0][0] for example in data.train] == [f"p{n}" for n in range(12)]
    assert {name: len(examples) for name, examples in data.validations.items()} == {"matched": 2, "mismatched": 3}
    assert not data.held_out


def test_a_dataset_of_the_hub_is_read_by_configurations(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    files = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - {{split: {split}, path: {name}/{split}.jsonl}}\n" for split in ("train", "validation"))
        for name in ("cola", "sst2")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    for first, name in enumerate(("cola", "sst2")):
        write_lines(tmp_path / name / "train.jsonl", sentiment(6, first))
        write_lines(tmp_path / name / "validation.jsonl", sentiment(2, first))
    data = read_task(TASKS["sst2"], f"hf:{tmp_path}")
    assert data == read_task(TASKS["sst2"], str(tmp_path))
    assert (len(data.train), len(data.validations[""]), data.held_out) == (6, 2, False)


def test_a_limit_draws_the_same_examples_each_time(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", sentiment(100))
    write_lines(tmp_path / "val.jsonl", sentiment(5, first=200))
    first, again = (read_task(TASKS["sst2"], str(tmp_path), 20) for _ in range(2))
    assert first == again
    assert (len(first.train), first.available, len(first.validations[""])) == (20, 100, 5)
    assert first.digest != read_task(TASKS["sst2"], str(tmp_path), 21).digest


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no train.jsonl", "nothing"]),
        ({"val.jsonl": sentiment(3)}, ["no train.jsonl", "val.jsonl"]),
        ({"train.jsonl": sentiment(3), "val.jsonl": sentiment(3), "dev.jsonl": sentiment(3)}, ["validation"]),
        ({"train.jsonl": [], "val.jsonl": sentiment(3)}, ["no train example"]),
        ({"train.jsonl": sentiment(3), "val.jsonl": []}, ["no validation example"]),
        ({"train.jsonl": [{"sentence": "a", "label": 5}]}, ["train.jsonl:1", "label 5"]),
    ],
)
def test_a_folder_that_is_no_task_is_refused(tmp_path: Path, files: dict[str, Any], words: list[str]) -> None:
    (tmp_path / "sst2").mkdir()
    for name, rows in files.items():
        write_lines(tmp_path / "sst2" / name, rows)
    before = open_files()
    with pytest.raises(InputError) as raised:
        read_task(TASKS["sst2"], str(tmp_path))
    assert open_files() == before
    for word in words if words != ["validation"] else ["has both val and dev"]:
        assert word in str(raised.value)


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(sentiment(1)[0]) + "\n[1]\n")
    with pytest.raises(InputError, match=r"train\.jsonl:2: a list"):
        read_task(TASKS["sst2"], str(tmp_path))


@pytest.mark.parametrize("name", ["rte", "cola", "sst2", "wnli", "boolq"])
def test_real_data_is_read(name: str) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data of tasks: {REAL / name}")
    data = read_task(TASKS[name], str(REAL))
    assert data.held_out is (name in ("cola", "wnli", "boolq"))
    assert {example.label for example in data.train} == {0, 1}
    assert 0.05 < len(data.validations[""]) / (len(data.train) + len(data.validations[""])) < 0.15 or not data.held_out
