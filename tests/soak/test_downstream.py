"""The script behind docs/results/downstream.md, from end to end, as small as it gets."""

from __future__ import annotations

import importlib.util
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.tasks import sentiment, write_lines

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "downstream.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("downstream", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["downstream"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = "".join(f"item {n} of list {n} has {n % 7} parts and {n % 3} colours\n" for n in range(2000))
    (tmp_path / "books").mkdir()
    for name in ("train-0", "valid"):
        with lzma.open(tmp_path / "books" / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps({"text": f"{name} {part} {text}"}) + "\n" for part in range(3))
    tasks = tmp_path / "eval"
    write_lines(tasks / "cola" / "train.jsonl", sentiment(60))
    pairs = [{"sentence1": f"item {n}", "sentence2": "list", "label": str(n % 2)} for n in range(60)]
    write_lines(tasks / "wnli" / "train.jsonl", pairs)
    blimp = [{"sentence_good": f"{n} parts", "sentence_bad": f"parts {n}", "UID": "order"} for n in range(10)]
    write_lines(tasks / "blimp" / "order.jsonl", blimp)
    (tasks / "lambada").mkdir()
    passages = "\n".join(f"item {n} of list {n}" for n in range(10))
    (tasks / "lambada" / "lambada_development_plain_text.txt").write_text(passages)
    flat: list[dict[str, Any]] = [
        {"question": f"what is {n}?", "choices": ["a", "b"], "gold": n % 2} for n in range(10)
    ]
    nested = [
        {"question": row["question"], "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
        for row in flat
    ]
    write_lines(tasks / "arc_easy" / "train.jsonl", flat)
    write_lines(tasks / "arc_easy" / "val.jsonl", nested)
    monkeypatch.setenv("BOOKS", str(tmp_path / "books"))
    monkeypatch.setenv("EVAL", str(tasks))
    monkeypatch.setenv("SPARSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_record_and_page_are_written_and_nothing_is_done_twice(
    script: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["downstream.py", str(data / "out"), "--toy", "--results", str(data / "results")]
    monkeypatch.setattr(sys, "argv", given)
    script.main()
    record = json.loads((data / "results" / "downstream" / "results.json").read_text())
    sparse, dense = record["runs"]["sparse"], record["runs"]["dense"]
    assert (sparse["finetuned"]["sparsity"], dense["finetuned"]["sparsity"]) == (0.9, 0.0)
    assert sparse["summary"]["tokens"] == dense["summary"]["tokens"]
    modes = {(row["task"], row["topology"]) for row in sparse["finetuned"]["rows"]}
    assert modes == {(task, mode) for task in ("wnli", "cola") for mode in ("frozen", "dense")}
    assert {row["topology"] for row in dense["finetuned"]["rows"]} == {"dense"}
    assert (
        list(sparse["asked"]["tasks"])
        == ["blimp_local", "lambada_local", "arc_easy_local"]
        == list(dense["asked"]["tasks"])
    )
    page = (data / "results" / "downstream.md").read_text()
    assert "| task | metric | sparse, topology frozen | densified | dense | majority class |" in page
    for name in ("blimp_local", "lambada_local", "arc_easy_local", "CoLA", "WNLI", "held out"):
        assert name in page
    stamps = {path: path.stat().st_mtime_ns for path in (data / "out").rglob("*") if path.parent.name == "ended"}
    assert len(stamps) == 12
    script.main()
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert (data / "results" / "downstream.md").read_text() == page
    monkeypatch.setattr(sys, "argv", ["downstream.py", "--page", "--results", str(data / "results")])
    (data / "results" / "downstream.md").unlink()
    script.main()
    assert (data / "results" / "downstream.md").read_text() == page
