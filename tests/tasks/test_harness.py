"""Runs asked by lm-evaluation-harness: the same likelihoods however the model is stored, and every option handed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.errors import InputError
from sparsae.evaluate.export import export_run
from sparsae.nn.linear import sparse_layers
from sparsae.tasks.harness import _known, _scores
from sparsae.train.run import start
from tests.support.lm_eval import write_tasks
from tests.support.runs import config_of, write_text

pytest.importorskip("lm_eval")
# Its libraries warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    settings = ["training.steps=40", "model.context=48", "training.learning_rate=3e-3", "teacher.enabled=true"]
    start(config_of(write_text(folder / "text"), folder / "cache", *settings), folder / "run", quiet=True)
    write_tasks(folder / "tasks")
    return folder


def likelihoods(place: Path, lm: Any) -> dict[str, list[list[float]]]:
    """The log-likelihoods of every continuation of every task."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    tasks = ["toy_pairs", "toy_word", "toy_rolling"]
    found = evaluator.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return {
        task: [
            [float(answer[0][0] if isinstance(answer[0], tuple) else answer[0]) for answer in sample["resps"]]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        for task, samples in found["samples"].items()
    }


def test_run_and_export_have_the_same_likelihoods(place: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from sparsae.tasks.lm_eval import SparsaeLM

    for form in ("dense", "sparse"):
        export_run(place / "run", tmp_path / form, form=form)
    ours = SparsaeLM(place / "run", batch_size=4)
    assert sparse_layers(ours.model)
    own = likelihoods(place, ours)
    dense, sparse = (HFLM(pretrained=str(tmp_path / form), device="cpu", batch_size=4) for form in ("dense", "sparse"))
    assert [bool(sparse_layers(lm.model)) for lm in (dense, sparse)] == [False, True]
    exported = [likelihoods(place, dense), likelihoods(place, sparse)]
    assert set(own) == {"toy_pairs", "toy_word", "toy_rolling"}
    values = [value for task in own.values() for sample in task for value in sample]
    assert len(values) == 4 * 12
    assert len(set(values)) > 20
    for task, samples in own.items():
        for other in exported:
            for one, same in zip(samples, other[task], strict=True):
                assert one == pytest.approx(same, abs=1e-5)


def asked(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    given = ["evaluate", str(place / "run"), "--include-path", str(place / "tasks"), "--json", "-", *more]
    assert main(given) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_hands_options_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(place, capsys, "--tasks", "toy")
    assert list(found["tasks"]) == ["toy", "toy_pairs", "toy_word"]
    accuracies = [found["tasks"][name]["metrics"]["acc"]["value"] for name in found["tasks"]]
    assert accuracies[0] == pytest.approx((accuracies[1] + accuracies[2]) / 2)
    assert accuracies[1] > 0.5  # which of two orders of words is text like that of the run
    assert [found["tasks"][name]["questions"] for name in found["tasks"]] == [24, 12, 12]
    less = asked(place, capsys, "--tasks", "toy_w*", "--limit", "5", "--num-fewshot", "1")
    assert list(less["tasks"]) == ["toy_word"]
    assert (less["tasks"]["toy_word"]["questions"], less["tasks"]["toy_word"]["fewshot"]) == (5, 1)
    solved, alone = (each["tasks"]["toy_word"]["metrics"]["perplexity"]["value"] for each in (less, found))
    assert solved != alone
    taught = asked(place, capsys, "--tasks", "toy_word", "--teacher")
    assert taught["tasks"]["toy_word"]["metrics"]["perplexity"]["value"] != alone


def test_a_table_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["evaluate", str(place / "run"), "--include-path", str(place / "tasks"), "--tasks", "toy_pairs"]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "score ± standard error" in lines[1]
    assert lines[2].split()[:2] == ["toy_pairs", "acc"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "toy_word", "--data", "x.txt"], ["--tasks", "--data"]),
        (["--limit", "3"], ["--limit", "--tasks"]),
        (["--include-path", "x"], ["--include-path", "--tasks"]),
        (["--tasks", "toy_word", "--device", "tpu"], ["--device", "tpu"]),
        (["--tasks", " , "], ["--tasks", "at least one name"]),
        (["--tasks", "toy_word", "--include-path", "missing"], ["--include-path", "missing"]),
    ],
)
def test_a_wrong_command_is_one_line(
    place: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(place / "run"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line


class Manager:
    """lm-eval's own looks through thousands of files."""

    own, all_tasks = ("blimp", "rte"), ["blimp", "rte"]

    def __init__(self, include_path: list[str] | None = None, include_defaults: bool = True) -> None:
        self.known = [*(include_path or []), *(self.own if include_defaults else ())]

    def match_tasks(self, names: list[str]) -> list[str]:
        return [known for known in self.known if known in names]


def test_own_tasks_come_first_and_near_names_are_offered() -> None:
    manager, names = _known(["mine"], ["mine"], Manager)
    assert (manager.known, names) == (["mine"], ["mine"])
    manager, names = _known(["mine", "rte"], ["mine"], Manager)
    assert (manager.known, names) == (["mine", "blimp", "rte"], ["mine", "rte"])
    with pytest.raises(InputError, match="'blimpp'; did you mean blimp"):
        _known(["blimpp"], [], Manager)
    with pytest.raises(InputError, match=r"'x9q'.*--include-path"):
        _known(["rte", "x9q"], [], Manager)


def test_data_that_is_gone_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "pairs.jsonl").unlink()
    given = ["evaluate", str(place / "run"), "--include-path", str(tmp_path / "tasks"), "--tasks", "toy_word"]
    assert main([*given, "--json", "-"]) == 2
    assert "the data of toy_word cannot be had" in capsys.readouterr().err


def test_questions_of_a_group_are_those_of_its_groups() -> None:
    groups = {"all": ["some", "one"], "some": ["two", "three"], "one": []}
    samples = {name: {"effective": n} for name, n in (("one", 1), ("two", 2), ("three", 4))}
    found = {"group_subtasks": groups, "n-samples": samples, "n-shot": {}}
    assert {name: _scores(name, {}, found).questions for name in groups} == {"all": 7, "some": 6, "one": 1}
