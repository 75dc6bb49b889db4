"""A stacked comparison: the same results, in parts, and a page that says what it does not measure."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.cli import main
from sparsae.experiments.compare.results import TIMING
from sparsae.experiments.jobs import progress, running
from sparsae.stack import drive
from sparsae.train.loop import Trainer
from sparsae.train.passes import Passes
from tests.support.runs import write_text
from tests.support.stacks import noted_graphs

pytestmark = pytest.mark.slow
PLAN = """
methods: [dense, static]
variants: {rigl: {method: rigl, settings: {topology: {every: 4}}}}
seeds: 2
sparsities: [0.8]
tuning: {learning_rates: [1.0e-3, 4.0e-3], share: 0.5}
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A comparison of runs of two shapes, which are tuned first."""
    folder = write_text(tmp_path_factory.mktemp("text"))
    plan = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.write_text(PLAN)
    return [
        "compare", str(plan), f"data.source={folder}", f"data.cache={tmp_path_factory.mktemp('cache')}",
        "data.tokenizer_vocab=300", "model.layers=1", "model.width=32", "model.heads=2", "model.context=16",
        "training.batch_size=2", "training.log_every=5", "training.validation_sequences=4", "training.device=cpu",
        "training.threads=1", "training.steps=12",
    ]  # fmt: skip


def results(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "results.json").read_text())
    return read


def numbers(value: Any) -> Any:
    """The results without what a stack does not measure, and without saying that it is one."""
    if isinstance(value, dict):
        left = {key: inner for key, inner in value.items() if key not in (*TIMING, "stacked", "warnings")}
        return {key: numbers(inner) for key, inner in left.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def stacked(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of that comparison, of which three at a time trained together."""
    out = tmp_path_factory.mktemp("stacked") / "out"
    assert main([*arguments, "--stack", "--stack-size", "3", "--out", str(out)]) == 0
    return out


def rows_of(out: Path) -> list[Any]:
    keys = ("method", "sparsity", "seed", "validation_loss", "train_flops", "steps", "nnz", "updates", "learning_rate")
    return [[row[key] for key in keys] for row in results(out)["rows"]]


def test_a_stack_finds_what_runs_one_by_one_find(arguments: list[str], stacked: Path, tmp_path: Path) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert rows_of(stacked) == [numbers(row) for row in rows_of(tmp_path / "out")]
    assert not any(row["stacked"] for row in results(tmp_path / "out")["rows"])


def test_times_are_left_out_and_the_page_says_so(stacked: Path) -> None:
    found = results(stacked)
    assert all(row["stacked"] for row in found["rows"])
    assert all(row[key] is None for row in found["rows"] for key in TIMING)
    assert all(trial["seconds"] is None for group in found["tuning"] for trial in group["trials"])
    assert "neither their memory nor their time" in found["warnings"][0]
    page = (stacked / "report.html").read_text()
    assert "neither their memory nor their time" in page
    assert "curve-seconds" not in page
    assert "Time of the runs" not in page


def test_it_goes_on_in_parts(
    arguments: list[str], stacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by the clock and by a signal, in the middle of runs, it ends with the same results."""
    clock, whole = [0.0], Trainer.stepping

    def stepping(self: Trainer) -> Passes[None]:
        yield from whole(self)
        clock[0] += 1.0
        if clock[0] == 40:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "stepping", stepping)
    monkeypatch.setattr("sparsae.train.stopping.time.monotonic", lambda: clock[0])
    command, codes = [*arguments, "--stack", "--stack-size", "4", "--out", str(tmp_path / "out")], []
    while not codes or (codes[-1] == 130 and len(codes) < 40):
        codes.append(main([*command, "--minutes", "0.25"]))
    assert codes == [130] * (len(codes) - 1) + [0]
    assert len(codes) > 5
    assert rows_of(tmp_path / "out") == [numbers(row) for row in rows_of(stacked)]


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_a_compiled_stack_finds_the_same(
    arguments: list[str], stacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, out = noted_graphs(monkeypatch), tmp_path / "out"
    command = [*arguments, "training.compile=true", "--stack", "--stack-size", "4", "--out", str(out)]
    assert main([*command, "--minutes", "0.0001"]) == 130
    assert main(command) == 0
    assert rows_of(out) == [numbers(row) for row in rows_of(stacked)]
    assert max(graphs) > 1
    assert len(graphs) < 20


def test_several_processes_have_a_stack_each(arguments: list[str], stacked: Path, tmp_path: Path) -> None:
    """Stopped by the clock, they go on."""
    out = tmp_path / "out"
    command, codes = [*arguments, "--stack", "--jobs", "2", "--out", str(out)], []
    for minutes in ("0.1", "5"):
        codes.append(main([*command, "--minutes", minutes]))
        if not codes[-1]:
            break
    assert set(codes[:-1]) == {130}
    assert codes[-1] == 0
    assert rows_of(out) == [numbers(row) for row in rows_of(stacked)]
    assert all(row["stacked"] for row in results(out)["rows"])


LATE = """
import time
from sparsae.experiments import stacked
from sparsae.experiments.jobs import progress

whole = stacked.running

def running(directory, config, stop):
    if directory.name == "static-0.8-3":
        end = time.monotonic() + 60
        while not progress(directory.with_name("static-0.8-0")):
            assert time.monotonic() < end
            time.sleep(0.02)
        directory.mkdir()
        (directory / "notes.txt").write_text("of somebody else")
    return whole(directory, config, stop)

stacked.running = running
"""


def test_what_is_wrong_with_a_run_of_one_process_lets_those_of_all_be_saved(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have made steps by then."""
    monkeypatch.setattr("sparsae.experiments.stacked.running", running)  # which the file below replaces here as well
    monkeypatch.setenv("SPARSAE_IMPORT", str(tmp_path / "late.py"))
    (tmp_path / "late.py").write_text(LATE)
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text("methods: [static]\nseeds: 4\nsparsities: [0.8]\nmatch: steps\n")
    given = ["compare", str(plan), *arguments[2:-1], "training.steps=3000"]
    assert main([*given, "--stack", "--jobs", "2", "--out", str(out)]) == 2
    assert "runs/static-0.8-3: " in capsys.readouterr().err
    # Of what has made a step nothing is lost.
    runs = [out / "runs" / f"static-0.8-{seed}" for seed in range(3)]
    begun = [run for run in runs if progress(run)]
    assert runs[0] in begun
    assert all(list(run.glob("checkpoints/step-*")) for run in begun)


def test_a_run_that_cannot_go_on_lets_the_others_be_saved(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsae.errors import InputError

    whole, stopped = Trainer.stepping, []

    def stepping(self: Trainer) -> Passes[None]:
        yield from whole(self)
        if self.step == 2 and not stopped:
            stopped.append(self)
            raise InputError("no room")

    monkeypatch.setattr(Trainer, "stepping", stepping)
    out = tmp_path / "out"
    assert main([*arguments, "--stack", "--out", str(out)]) == 2
    assert "tuning/" in (error := capsys.readouterr().err)
    assert "no room" in error
    assert len(list(out.glob("tuning/*/checkpoints/step-*"))) == 5  # of six trials
    monkeypatch.setattr(Trainer, "stepping", whole)
    assert main([*arguments, "--stack", "--out", str(out)]) == 0


def test_memory_that_runs_out_in_the_middle_is_one_line_and_nothing_saved_is_lost(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, computed, left = tmp_path / "out", drive._computed, iter(range(20))

    def short(*given: Any) -> Any:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return computed(*given)

    monkeypatch.setattr(drive, "_computed", short)
    assert main([*arguments, "training.checkpoint_every=1", "--stack", "--out", str(out)]) == 2
    assert re.fullmatch(r"sparsae: error: \S+: .*memory.*", capsys.readouterr().err.strip().splitlines()[-1])
    assert list(out.glob("tuning/*/checkpoints/step-*"))
    monkeypatch.setattr(drive, "_computed", computed)
    assert main([*arguments, "training.checkpoint_every=1", "--stack", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stack", "model.dropout=0.1"], "model.dropout is 0.1"),
        (
            ["--stack", "model.family=llama", "model.transformers={attention_dropout: 0.1}"],
            "model.transformers.attention_dropout is 0.1",
        ),
        (["--stack", "--ray", "local"], "leave out --ray"),
        (["--stack-size", "3"], "give --stack too"),
        (["--minutes", "0"], "--minutes: must be above 0"),
        (["--minutes", "1", "--ray", "local"], "leave out --ray"),
    ],
)
def test_what_cannot_be_stacked_is_refused(
    options: list[str], said: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
