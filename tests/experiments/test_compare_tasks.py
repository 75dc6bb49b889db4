"""A comparison that ends with tasks: every run is fine-tuned once, and its report holds methods against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.experiments.compare import tasks
from sparsae.experiments.compare.record import Row
from sparsae.experiments.compare.tasks import summarize_tasks, tasks_table
from sparsae.tasks.finetune import DivergedError
from sparsae.tasks.record import Score, TaskScores
from tests.support.results import compare_results, compare_row
from tests.support.runs import write_text
from tests.support.tasks import sentiment, write_lines

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

SMALL = [
    "data.tokenizer_vocab=300", "model.layers=1", "model.width=32", "model.heads=2", "model.context=32",
    "training.batch_size=2", "training.steps=8", "training.validation_sequences=4", "training.device=cpu",
    "training.threads=1",
]  # fmt: skip


def plan(place: Path, **more: Any) -> str:
    write_lines(place / "data" / "sst2" / "train.jsonl", sentiment(60))
    write_text(place / "text")
    asked = {"names": ["sst2"], "data": str(place / "data"), "seeds": 2, "epochs": 1, "max_examples": 16}
    written = {"methods": ["dense", "static"], "seeds": 2, "match": "steps", "tasks": {**asked, **more}}
    (place / "plan.yaml").write_text(json.dumps(written))
    return str(place / "plan.yaml")


def command(place: Path, *more: str, **tasks: Any) -> list[str]:
    data = [f"data.source={place / 'text'}", f"data.cache={place / 'cache'}"]
    return ["compare", plan(place, **tasks), "--out", str(place / "out"), *SMALL, *data, *more]


@pytest.mark.slow
def test_every_run_is_fine_tuned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, began = tasks.finetune_run, list[str]()

    def stopping(run: Path, *given: Any, **named: Any) -> Any:
        began.append(run.name)
        if len(began) == 2:
            raise KeyboardInterrupt
        return whole(run, *given, **named)

    monkeypatch.setattr(tasks, "finetune_run", stopping)
    given = command(tmp_path)
    assert main(given) == 130
    assert main(given) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    modes = {(entry["method"], entry["topology"]): entry for entry in found["tasks"]}
    assert set(modes) == {("dense", "dense"), ("static", "frozen")}
    for row in found["rows"]:
        (task,) = row["tasks"]
        assert set(task["scores"]["accuracy"]["values"]) == {"0", "1"}
    runs = [row["tasks"][0]["scores"]["score"]["mean"] for row in found["rows"] if row["method"] == "static"]
    entry = modes["static", "frozen"]["tasks"]["sst2"]
    assert (entry["n"], entry["mean"]) == (2, pytest.approx(sum(runs) / 2))
    texts = [shown, *((tmp_path / "out" / name).read_text() for name in ("table.md", "report.html"))]
    for text in texts:
        assert "Scores on tasks" in text
        assert "majority class" in text
    assert 'id="tasks"' in texts[-1]
    assert "has no validation split" in texts[-1]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("ended/*.json")}
    assert len(stamps) == 8
    assert main(given) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


@pytest.mark.parametrize(
    ("more", "options", "words"),
    [
        ({"names": ["sst3"]}, [], ["tasks.names", "did you mean sst2"]),
        ({"data": "missing"}, [], ["missing", "no such directory"]),
        ({"epoch": 3}, [], ["tasks.epoch", "epochs"]),
        ({}, ["--minutes", "3"], ["--minutes", "tasks"]),
        ({"data": "missing"}, ["--dry-run"], ["missing", "no such directory"]),
        ({"max_length": 640}, [], ["max_length 640", "give at most so many"]),
        ({"max_length": 640}, ["--dry-run"], ["max_length 640", "give at most so many"]),
    ],
)
def test_wrong_tasks_are_refused_before_anything_is_trained(
    tmp_path: Path, more: dict[str, Any], options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(tmp_path, *options, **more)
    if "--dry-run" in options:
        given.remove("--out")
        given.remove(str(tmp_path / "out"))
    assert main(given) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_means_are_over_runs_and_over_tasks() -> None:
    def row(seed: int, rte: float, sst2: float) -> Row:
        scores = {"rte": rte, "sst2": sst2}
        done = tuple(
            TaskScores(
                task=task,
                title=task.upper(),
                topology="frozen",
                scores={"score": Score(n=1, mean=value, low=None, high=None, values={"0": value})},
                majority={"score": 0.5},
                train_examples=4,
                available_examples=4,
                validation_examples=2,
                held_out=False,
                shortened=0,
                rule=None,
                swaps=0,
            )
            for task, value in scores.items()
        )
        return compare_row("static", seed, 3.0, tasks=done)

    rows = [row(0, 0.5, 0.9), row(1, 0.6, 0.8)]
    (entry,) = found = summarize_tasks(rows)
    assert entry.tasks["rte"].mean == pytest.approx(0.55)
    assert (entry.mean.n, entry.mean.mean) == (2, pytest.approx(0.7))
    table = tasks_table(compare_results(rows, tasks=found))
    assert table.columns[3:] == ["RTE", "SST2", "mean"]
    assert table.rows[0][-1] == "70.0 ± 0.0"
    assert list(table.rows[-1]) == ["majority class", "", "", "50.0", "50.0", "50.0"]


@pytest.mark.slow
def test_a_fine_tuning_that_diverges_leaves_the_others_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tasks.finetune_run

    def diverging(run: Path, *given: Any, **named: Any) -> Any:
        if run.name.startswith("static"):
            raise DivergedError("task sst2: training diverged: lower --learning-rate 1")
        return whole(run, *given, **named)

    monkeypatch.setattr(tasks, "finetune_run", diverging)
    assert main(command(tmp_path)) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {entry["method"] for entry in found["tasks"]} == {"dense"}
    assert {(row["method"], bool(row["tasks"])) for row in found["rows"]} == {("dense", True), ("static", False)}
    shown = capsys.readouterr()
    assert "training diverged" in shown.out + shown.err
    assert (tmp_path / "out" / "report.html").is_file()
