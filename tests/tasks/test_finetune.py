"""`sparsae finetune` from end to end: what is trained, what is kept of it, and what a wrong command is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.cli import main
from sparsae.cli.tasks import _OPTIONS
from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.nn.linear import sparse_layers
from sparsae.tasks import finetune as one
from sparsae.tasks.catalogue import TASKS
from sparsae.tasks.data import TaskData, read_task
from sparsae.tasks.finetune import finetune
from sparsae.tasks.record import Outcome
from sparsae.tasks.settings import FinetuneConfig, finetune_config
from sparsae.train.objective import Objective
from sparsae.train.run import start
from tests.support.runs import config_of, write_text
from tests.support.tasks import sentiment, write_lines

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse run, a dense one, and tasks: one that is easy to learn, and one of choices."""
    folder = tmp_path_factory.mktemp("finetune")
    text = write_text(folder / "text")
    for name, method in (("sparse", "set"), ("dense", "dense")):
        config = config_of(text, folder / "cache", "training.steps=8", "model.context=32", method=method)
        start(config, folder / name, quiet=True)
    write_lines(folder / "data" / "sst2" / "train.jsonl", sentiment(160))
    choices = [
        {"premise": f"item {n}", "choice1": "good", "choice2": "bad", "question": "effect", "label": 0}
        for n in range(12)
    ]
    write_lines(folder / "data" / "copa" / "train.jsonl", choices)
    write_lines(folder / "data" / "copa" / "val.jsonl", choices[:4])
    return folder


def settings(place: Path, **more: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {"names": ["sst2"], "data": str(place / "data"), "learning_rate": 5e-3, **more}
    )


def data(place: Path) -> TaskData:
    return read_task(TASKS["sst2"], str(place / "data"))


def test_a_task_is_learnt_and_equal_seeds_are_equal(place: Path) -> None:
    def trained(seed: int) -> Outcome:
        return finetune(place / "sparse", data(place), "dense", seed, settings(place, epochs=4), lambda: None)

    first, again, other = trained(0), trained(0), trained(1)
    assert first.scores["accuracy"] > 0.95
    assert first.scores == first.epochs[-1]
    assert len(first.epochs) == 4
    assert (first.scores, first.training_loss) == (again.scores, again.training_loss)
    assert first.training_loss != other.training_loss


def test_a_precision_is_what_it_computes_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(**more: Any) -> tuple[Outcome, set[Any]]:
        seen: set[Any] = set()
        build = one.classifier

        def watched(*given: Any) -> Any:
            model = build(*given)
            model.score.register_forward_hook(lambda _, __, y: seen.add((model.training, y.dtype)))
            return model

        monkeypatch.setattr(one, "classifier", watched)
        few = settings(place, epochs=1, max_examples=16, **more)
        found = finetune(place / "sparse", read_task(TASKS["sst2"], str(place / "data"), 16), "frozen", 0, few, print)
        monkeypatch.setattr(one, "classifier", build)
        return found, seen

    (full, of_full), (half, of_half) = trained(), trained(precision="bfloat16")
    assert of_full == {(True, torch.float32), (False, torch.float32)}
    assert of_half == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert half.training_loss == pytest.approx(full.training_loss, rel=0.05)
    assert half.training_loss != full.training_loss


@pytest.mark.parametrize("mode", ["frozen", "searched", "dense"])
def test_the_topology_is_frozen_searched_or_given_up(place: Path, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: layer.topology.indices for name, layer in sparse_layers(load_run(place / "sparse").model).items()}
    made, build = [], one.classifier
    monkeypatch.setattr(one, "classifier", lambda *given: made.append(build(*given)) or made[0])
    steps: list[None] = []
    outcome = finetune(place / "sparse", data(place), mode, 0, settings(place), lambda: steps.append(None))
    assert len(steps) == one.step_count(settings(place), len(data(place).train))
    (model,) = made
    layers = sparse_layers(model)
    if mode == "dense":
        assert (layers, outcome.nnz) == ({}, 0)
        return
    same = all(layer.topology.indices.equal(before[name]) for name, layer in layers.items())
    assert set(layers) == set(before)
    assert outcome.nnz == sum(map(len, before.values()))
    assert same is (mode == "frozen")
    # The run's own rule goes on.
    assert outcome.rule == ("set" if mode == "searched" else None)
    assert (outcome.swaps > 0) is (mode == "searched")


def test_what_is_searched_keeps_the_runs_rules_and_bounds_whatever_the_layers_are_called(
    place: Path, tmp_path: Path
) -> None:
    rules = "{'transformer.h.0.mlp.*': {rule: set, every: 2}, lm_head: {rule: static}}"
    bounds = ["sparsity.fan_in=[0.8,1.25]", "sparsity.head_min_density=0.05", "sparsity.sparsify_head=true"]
    more = ["model.tie_embeddings=false", "training.steps=4", "model.context=32", "sparsity.sparsity=0.6"]
    config = config_of(place / "text", place / "cache", f"rules={rules}", *bounds, *more, method="set")
    start(config, tmp_path / "run", quiet=True)
    for name in ("sst2", "copa"):
        task = read_task(TASKS[name], str(place / "data"))
        model = one.classifier(load_run(tmp_path / "run"), task.task, 0)
        found = one._search(config, model)
        assert found["fan_in"] == (0.8, 1.25)
        assert found["heads"].keys() < sparse_layers(model).keys()
        few = settings(place, names=[name], epochs=2, max_examples=12)
        outcome = finetune(tmp_path / "run", task, "searched", 0, few, lambda: None)
        assert outcome.rule == "set"
        assert list(found["rules"]) == ["model." * (name == "copa") + "transformer.h.0.mlp.*"]


def test_a_rule_of_the_head_alone_is_none_of_what_is_searched(place: Path, tmp_path: Path) -> None:
    more = ["sparsity.sparsify_head=true", "model.tie_embeddings=false", "training.steps=2", "model.context=32"]
    common = place / "text", place / "cache", *more
    for method, rules, expected in (
        ("static", "{lm_head: {rule: set}}", "generations"),  # nothing else moves: the default rule
        ("set", "{'transformer.*': {rule: rigl}}", "rigl"),  # which the head alone had is gone with it
    ):
        config = config_of(*common, f"rules={rules}", method=method)
        start(config, tmp_path / method, quiet=True)
        task = read_task(TASKS["sst2"], str(place / "data"))
        found = one._search(config, one.classifier(load_run(tmp_path / method), task.task, 0))
        assert found["topology"].rule == expected
        few = settings(place, epochs=1, max_examples=64)
        assert finetune(tmp_path / method, task, "searched", 0, few, lambda: None).rule == expected


def test_fine_tuning_begins_with_the_best_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run whose loss got worse; one that keeps none is refused before anything is read."""
    losses = itertools.cycle([3.0, 2.0, 2.5])
    monkeypatch.setattr(Objective, "validate", lambda self, rows: (next(losses), None))
    keeping = ["training.steps=8", "training.validate_every=4", "training.keep_best=true", "model.context=32"]
    start(config_of(place / "text", place / "cache", *keeping), tmp_path / "run", quiet=True)
    loaded, load = [], one.load_run
    monkeypatch.setattr(one, "load_run", lambda *given, **how: loaded.append(load(*given, **how)) or loaded[-1])
    given = ["--data", str(place / "data"), "--task", "sst2", "--seeds", "1", "--epochs", "1", "--max-examples", "16"]
    for more, step in ((["--best"], 4), ([], 8)):
        capsys.readouterr()
        assert main(["finetune", str(tmp_path / "run"), *given, "--json", "-", *more]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == loaded[-1].step == step
    assert main(command(place, "--task", "sst2", "--best")) == 2
    assert "training.keep_best=true" in capsys.readouterr().err


@pytest.mark.parametrize("key", FinetuneConfig.model_fields)
def test_what_is_wrong_is_told_of_the_option(key: str) -> None:
    with pytest.raises(InputError, match=r"^--[a-z-]+: must be") as told:
        finetune_config({"names": ["sst2"], "data": "x", key: {}}, _OPTIONS)
    assert str(told.value).startswith(f"{_OPTIONS[key]}: must be")


def command(place: Path, *more: str) -> list[str]:
    return ["finetune", str(place / "sparse"), "--data", str(place / "data"), *more]


def test_the_command_writes_table_page_and_json(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "sst2,copa", "--topology", "frozen,dense", "--seeds", "2", "--epochs", "2"]
    options += ["--max-examples", "32", "--learning-rate", "5e-3", "--out", str(tmp_path / "out")]
    assert main(command(place, *options)) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["task"], row["topology"]): row for row in written["rows"]}
    assert list(rows) == [("sst2", "frozen"), ("sst2", "dense"), ("copa", "frozen"), ("copa", "dense")]
    first = rows["sst2", "frozen"]
    assert first["held_out"]
    assert not rows["copa", "dense"]["held_out"]
    assert (rows["sst2", "dense"]["nnz"], first["scores"]["accuracy"]["n"]) == (0, 2)
    values = list(first["scores"]["accuracy"]["values"].values())
    assert first["scores"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert set(first["epochs"]) == {"0", "1"}
    tasks = [rows[task, "dense"]["scores"]["score"]["mean"] for task in ("sst2", "copa")]
    (mean,) = [mean for mean in written["means"] if mean["topology"] == "dense"]
    assert mean["mean"] == pytest.approx(sum(tasks) / 2)
    table, page = ((tmp_path / "out" / name).read_text() for name in ("table.md", "report.html"))
    for text in (shown, table):
        assert "majority class" in text
        assert "held out" in text
        assert f"{100 * first['majority']['accuracy']:.1f}" in text
    assert "SST-2: the data has no validation split" in shown
    assert f"SST-2: 32 of {first['available_examples']} training examples" in shown
    assert "SST-2: the data has no validation split" in page
    assert page.count("<svg") == 4
    assert "<script" not in page


def test_what_ended_is_kept_and_not_done_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, asked = one.finetune, list[int]()

    def interrupted(run: Path, data: TaskData, mode: Any, seed: int, *more: Any) -> Outcome:
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(run, data, mode, seed, *more)

    monkeypatch.setattr(one, "finetune", interrupted)
    given = command(place, "--task", "sst2", "--seeds", "3", "--epochs", "1", "--max-examples", "16")
    given += ["--out", str(tmp_path / "out")]
    assert main(given) == 130
    assert "kept" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    assert main([*given, "--json", "-"]) == 0
    assert asked == [0, 1, 1, 2]
    found = json.loads(capsys.readouterr().out)
    assert set(found["rows"][0]["scores"]["accuracy"]["values"]) == {"0", "1", "2"}
    assert main([*given, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert asked == [0, 1, 1, 2]
    # Other settings are another fine-tuning, beside the first.
    assert main([*given, "--learning-rate", "1e-3"]) == 0
    assert asked == [0, 1, 1, 2, 0, 1, 2]
    (first, *_) = sorted((tmp_path / "out" / "ended").glob("*-0-*.json"))
    first.write_text(first.read_text().replace('"nnz"', '"nnzz"'))
    capsys.readouterr()
    codes = [main(given), main([*given, "--learning-rate", "1e-3"])]
    assert sorted(codes) == [0, 2]
    assert "damaged" in capsys.readouterr().err


def test_a_dense_run_is_called_dense(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["finetune", str(place / "dense"), "--task", "sst2", "--data", str(place / "data"), "--seeds", "1"]
    assert main([*given, "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "densified" not in shown
    assert "dense " in shown
    assert main([*given, "--topology", "frozen"]) == 2
    assert "leave out --topology" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "sst3"], ["--task", "'sst3'", "did you mean sst2?"]),
        (["--task", "sst2,sst2"], ["--task", "twice"]),
        (["--task", "rte"], ["no train.jsonl", "rte"]),
        (["--task", "sst2", "--topology", "frozn"], ["--topology", "'frozn'", "'frozen'"]),
        (["--task", "sst2", "--epochs", "0"], ["--epochs", "at least 1"]),
        (["--task", "sst2", "--seeds", "a"], ["--seeds", "'a'"]),
        (["--task", "sst2", "--seeds", "0"], ["--seeds", "1 to 1000"]),
        (["--task", "sst2", "--learning-rate", "nan"], ["--learning-rate", "finite"]),
        (["--task", "sst2", "--max-length", "2"], ["--max-length", "at least 8"]),
        (["--task", "sst2", "--max-length", "640"], ["max_length 640", "give at most so many"]),
        (["--task", "sst2", "--precision", "float16"], ["--precision", "'float32' or 'bfloat16'"]),
        (["--task", "sst2", "--device", "tpu"], ["--device", "tpu"]),
    ],
)
def test_a_wrong_command_writes_nothing(
    place: Path, tmp_path: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, *options, "--out", str(tmp_path / "out"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command(place, "--task", "sst2", "--out", str(tmp_path / "out"))) == 2
    assert "pip install 'sparsae[tasks]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_is_no_result(place: Path) -> None:
    """Losses that are no numbers count: the Trainer would put the mean of those before in their place."""
    with pytest.raises(InputError, match=r"sst2: training diverged: lower --learning-rate 1e\+30"):
        finetune(place / "sparse", data(place), "frozen", 0, settings(place, learning_rate=1e30), lambda: None)
