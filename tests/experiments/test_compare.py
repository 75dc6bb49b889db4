"""Experiments from plan to results: matching, tuning, stopping at any moment and going on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.compare.results import TIMING
from sparsae.experiments.plan import parse_plan

pytestmark = pytest.mark.slow
SMALL = [
    "data.tokenizer_vocab=300", "model.layers=2", "model.width=32", "model.heads=2", "model.context=32",
    "training.batch_size=4", "training.log_every=5", "training.validation_sequences=4", "training.device=cpu",
    "training.steps=24",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of every run: a tiny model on a few documents."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        lines = [f"item {j} of list {i}: {'abc' * (j % 5)} has {j % 7} parts and {i % 3} colours" for j in range(60)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    # Sums depend on the number of threads in their last bits, and workers share the machine's.
    threads = "training.threads=1"
    return [*SMALL, threads, f"data.source={folder}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


def without_timing(value: Any) -> Any:
    """The part of results.json that a second experiment repeats."""
    if isinstance(value, dict):
        return {key: without_timing(inner) for key, inner in value.items() if key not in TIMING}
    return [without_timing(inner) for inner in value] if isinstance(value, list) else value


def results(out: Path) -> dict[str, Any]:
    return without_timing(json.loads((out / "results.json").read_text()))


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    """A comparison with everything in it: dense and sparse methods, tuning, two seeds."""
    plan = "compare --methods dense,static,sparsae-guided --seeds 2 --sparsities 0.9 --learning-rates 1e-3,4e-3"
    return [*plan.split(), "--tuning-share", "0.5", *settings]


@pytest.fixture(scope="module")
def unbroken(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of that comparison, run without a stop."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def test_every_method_seed_and_sparsity_is_a_row(unbroken: Path) -> None:
    found = results(unbroken)
    keys = [(row["seed"], row["sparsity"], row["method"]) for row in found["rows"]]
    assert keys == [(n, 0.9, m) for n in (0, 1) for m in ("dense", "static", "sparsae-guided")]
    assert found["complete"]
    for row in found["rows"]:
        assert row["validation_loss"] > 0
        assert row["train_flops"] == sum(row["train_flops_by_part"].values())
        assert row["state_bytes"] > 0
        assert row["curve"][-1]["loss"] == row["validation_loss"]
        assert row["test_loss"] > 0
        assert row["test_loss"] != row["validation_loss"]
        assert row["accepted_updates"] == (0 if row["method"] != "sparsae-guided" else row["updates"])


def test_what_it_takes_is_shown_before_anything_is_run(
    arguments: list[str], unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, found = tmp_path / "foreseen.json", results(unbroken)
    capsys.readouterr()
    assert main([*arguments, "--dry-run", "--out", str(tmp_path / "new"), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    foreseen = json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]
    tried, compared = foreseen["rows"][:3], foreseen["rows"][3:]
    for row, trial in zip(compared, tried, strict=True):
        assert (row["sparsity"], row["runs"], trial["runs"]) == (0.9, 2, 2)
        assert trial["what"] == f"{row['what']}: trial"
        runs = [run for run in found["rows"] if run["method"] == row["what"]]
        trials = next(group["trials"] for group in found["tuning"] if group["method"] == row["what"])
        assert {run["steps"] for run in runs} == {row["steps"]}
        assert {run["tokens"] for run in runs} == {row["tokens"]}
        if row["what"] != "sparsae-guided":  # which does not know before how many candidates it rejects
            assert {run["train_flops"] for run in runs} == {row["train_flops"]}
            assert {one["train_flops"] for one in trials} == {trial["train_flops"]}
        assert 0 < trial["expected_seconds"] < row["expected_seconds"]
        assert re.search(rf"^ +{row['what']} +0.9 +2 +{row['steps']} +{row['tokens']:,} ", shown, re.MULTILINE)
    for key in ("train_flops", "expected_seconds"):
        assert foreseen[key] == pytest.approx(sum(row["runs"] * row[key] for row in foreseen["rows"]))
    assert foreseen["runs"] == 12


def test_counted_flops_are_within_a_step_of_the_budget(unbroken: Path) -> None:
    rows = results(unbroken)["rows"]
    budgets = {row["sparsity"]: row["train_flops"] for row in rows if row["method"] == "static"}
    for row in rows:
        assert row["budget"] == budgets[row["sparsity"]]
        assert abs(row["train_flops"] - row["budget"]) < row["train_flops"] / row["steps"]
        assert row["budget_deviation"] == pytest.approx(row["train_flops"] / row["budget"] - 1)
    steps = {row["method"]: row["steps"] for row in rows if row["sparsity"] == 0.9}
    assert steps["static"] == 24
    assert steps["dense"] < steps["sparsae-guided"] < steps["static"]


def test_each_method_tries_as_many_learning_rates_and_takes_the_best(unbroken: Path) -> None:
    found = results(unbroken)
    assert [(group["method"], group["sparsity"]) for group in found["tuning"]] == [
        (method, 0.9) for method in ("dense", "static", "sparsae-guided")
    ]
    for group in found["tuning"]:
        rates = [trial["learning_rate"] for trial in group["trials"]]
        assert rates == sorted({1e-3, 4e-3, *group["looks"][0]["added"]})
        best = min(group["trials"], key=lambda trial: trial["validation_loss"])
        assert group["learning_rate"] == best["learning_rate"]
        # The grid was extended fourfold at a time until the best rate had neighbours on both sides.
        assert group["at_edge"] == (group["learning_rate"] in (rates[0], rates[-1]))
        assert all(b == pytest.approx(4 * a) for a, b in pairwise(rates))
        assert len(rates) > 2
        assert group["train_flops"] == sum(trial["train_flops"] for trial in group["trials"])
        mine = [r for r in found["rows"] if (r["method"], r["sparsity"]) == (group["method"], group["sparsity"])]
        assert {row["learning_rate"] for row in mine} == {group["learning_rate"]}
        # Half the budget is half the operations.
        assert all(trial["train_flops"] < 0.6 * mine[0]["budget"] for trial in group["trials"])


def test_the_test_is_what_is_compared_and_trials_are_chosen_by_validation(unbroken: Path) -> None:
    found = results(unbroken)
    assert found["judged_by"] == "test_loss"
    losses = {(row["method"], row["seed"]): row["test_loss"] for row in found["rows"]}
    for entry in found["summary"]:
        mine = [losses[entry["method"], seed] for seed in (0, 1)]
        assert entry["test_loss"]["mean"] == pytest.approx(sum(mine) / 2)
        if entry["difference"]:
            expected = sum(mine) / 2 - sum(losses["static", seed] for seed in (0, 1)) / 2
            assert entry["difference"]["mean"] == pytest.approx(expected)
    assert "final test loss" in (unbroken / "table.md").read_text()


def test_the_page_of_a_version_without_a_test_is_written_again(unbroken: Path, tmp_path: Path) -> None:
    """Of results.json as it was: no test, and the losses compared were those of validation."""
    out = shutil.copytree(unbroken, tmp_path / "earlier")
    found = json.loads((out / "results.json").read_text())
    del found["judged_by"]
    for part in ("rows", "summary"):
        for entry in found[part]:
            del entry["test_loss"]
    (out / "results.json").write_text(json.dumps(found))
    assert main(["report", str(out)]) == 0
    assert "final validation loss" in (out / "report.html").read_text()


def test_seeds_pair_the_data(unbroken: Path) -> None:
    """What the untrained model loses depends on the seed alone between methods of the same sparsity."""
    first = {(r["method"], r["seed"], r["sparsity"]): r["curve"][0]["loss"] for r in results(unbroken)["rows"]}
    assert first["static", 0, 0.9] == first["sparsae-guided", 0, 0.9] != first["static", 1, 0.9]


def kill_and_go_on(arguments: list[str], out: Path, number: int, after: Callable[[], bool]) -> None:
    command = [sys.executable, "-m", "sparsae", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not after() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert main([*arguments, "--out", str(out)]) == 0


def test_stopped_and_started_again_it_ends_with_the_same_results(
    arguments: list[str], unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    begun = "tuning/static-0.9-1000-lr0.001/metrics.jsonl"
    kill_and_go_on(arguments, out, signal.SIGTERM, lambda: any(out.glob(begun)))
    assert results(out) == results(unbroken)


def test_a_finished_comparison_runs_nothing_again(arguments: list[str], unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.glob("*/*/summary.json")}
    assert main([*arguments, "--out", str(unbroken)]) == 0
    assert {path: path.stat().st_mtime_ns for path in unbroken.glob("*/*/summary.json")} == before


def test_the_page_stands_alone_and_tells_what_was_compared(unbroken: Path) -> None:
    page = (unbroken / "report.html").read_text()
    assert "further match over those there" not in page
    for section in ("results", "curves", "topology", "cost", "tuning", "settings", "reading"):
        assert f'<section id="{section}"' in page
    assert "beyond the grid" in page
    assert "static" in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "<script" not in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_report_writes_the_page_again(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (unbroken / "report.html").read_text()
    (unbroken / "report.html").unlink()
    assert main(["report", str(unbroken)]) == 0
    assert capsys.readouterr().out.strip() == str(unbroken / "report.html")
    assert (unbroken / "report.html").read_text() == before


def test_the_tables_have_every_method_at_every_sparsity(unbroken: Path) -> None:
    markdown, latex = (unbroken / "table.md").read_text(), (unbroken / "table.tex").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| 90 %")]
    assert len(rows) == 3
    assert latex.count(r"\\") == 4
    assert all(part in latex for part in (r"\toprule", r"\bottomrule", r"90 \%"))


def test_killed_workers_save_and_the_results_are_the_same(arguments: list[str], unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    jobs = [*arguments, "--jobs", "2"]
    saved = "runs/sparsae-guided-0.9-0/checkpoints/step-*/state.json"
    kill_and_go_on(jobs, out, signal.SIGKILL, lambda: any(out.glob(saved)))
    assert results(out) == results(unbroken)


def test_a_run_that_diverges_is_a_trial_that_failed(settings: list[str], tmp_path: Path) -> None:
    plan = ["compare", "--methods", "static", "--seeds", "1", "--tuning-extensions", "0", "--learning-rates"]
    for name, rates in (("one", "1e-3,1e30"), ("all", "1e29,1e30")):
        out = tmp_path / name
        assert main([*plan, rates, "--out", str(out), *settings, "training.clip=null"]) == 0
        found, page = results(out), (out / "report.html").read_text("utf-8")
        bad = [trial for trial in found["tuning"][0]["trials"] if trial["diverged"]]
        assert len(bad) == (1 if name == "one" else 2)
        assert all(trial["train_flops"] > 0 for trial in bad)
        assert found["conclusions"] == [{"sparsity": 0.9, "winner": None}]
        # Where all failed no value is the best, at an edge or inside.
        assert ("nowhere: every trial diverged" in page) is (name == "all")
        assert ("every trial of its tuning diverged" in page) is (name == "all")
        assert found["tuning"][0]["edges"] == ([] if name == "all" else ["training.learning_rate"])
        assert (found["rows"][0]["learning_rate"] == 1e-3) is (name == "one")


WRONG = {
    "nothing to compare": ([], "name at least one of"),
    "an unknown method": (["--methods", "statik"], "did you mean static"),
    "a method twice": (["--methods", "static,static"], "given twice"),
    "no number": (["--methods", "static", "--sparsities", "0.9,high"], "--sparsities: must be numbers"),
    "sparsity 1": (["--methods", "static", "--sparsities", "1"], "must be below 1"),
    "an unknown match": (["--methods", "static", "--match", "time"], "'flops', 'tokens' or 'steps'"),
    "an absent reference": (["--methods", "static", "--reference", "dense"], "'dense' is not compared"),
    "a grid of one": (["--methods", "static", "--learning-rates", "1e-3"], "one learning rate is no grid"),
    "an unknown setting": (["--methods", "static", "training.stepz=3"], "did you mean"),
    "a setting of another rule": (["--methods", "static", "topology.every=3"], "topology.every"),
    "a seed among the settings": (["--methods", "static", "seed=3"], "leave out seed"),
    "a rule for all methods": (["--methods", "static", "topology.rule=rigl"], "leave out topology.rule"),
    "a sparsity for all": (["--methods", "static", "sparsity.sparsity=0.3"], "leave out sparsity.sparsity"),
    "a budget below a step": (["--methods", "static", "--budget", "1"], "raise --budget"),
    "two plans": (["a.yaml", "b.yaml"], "two plans"),
    "no such plan": (["a.yaml"], "cannot read"),
    "both ways to run": (["--methods", "static", "--jobs", "2", "--ray", "auto"], "give one of them"),
}


@pytest.mark.parametrize(
    "plan",
    [
        {"variants": {"a": {"method": "set", "settings": {"sparsity": {"sparsity": 0.3}}}}},
        {"variants": {"a": {"method": "set", "settings": {"method": "rigl"}}}},
        {"variants": {"a": {"method": "set", "settings": {"preset": "tiny"}}}},
        {"variants": {"a": {"method": "set", "settings": {"seed": 3}}}},
        {"methods": ["set"], "tuning": {"grid": {"sparsity.sparsity": [0.2, 0.6]}}},
        {"methods": ["set"], "settings": {"seed": {"a": 1}}},
        {"methods": ["set"], "settings": {"method": "rigl"}},
    ],
)
def test_no_run_can_be_another_than_it_is_called(plan: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"leave out [a-z.]+, which the plan gives by [a-z ]+"):
        parse_plan(plan, "here", ComparisonPlan)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_gives_one_line_and_writes_nothing(
    name: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options, expected = WRONG[name]
    assert main(["compare", *options, "--out", "out", *(settings if options[:1] != ["a.yaml"] else [])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsae: error")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_in_a_file(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Variants with settings and a match of their own; the command line wins over the file."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "methods: [static]\nseeds: [5]\nmatch: tokens\nsparsities: [0.8]\n"
        "variants:\n  one: {method: sparsae-guided, settings: {topology: {candidates: 1}}}\n"
        "  small: {method: dense-small, match: flops}\n"
    )
    out = tmp_path / "out"
    assert main(["compare", str(plan), "--sparsities", "0.9", "--out", str(out), *settings]) == 0
    rows = {row["method"]: row for row in results(out)["rows"]}
    assert [(r["seed"], r["sparsity"]) for r in rows.values()] == [(5, 0.9)] * 3
    assert rows["one"]["steps"] == rows["static"]["steps"] == 24
    assert rows["small"]["match"] == "flops"
    assert rows["small"]["train_flops"] == pytest.approx(rows["static"]["train_flops"], rel=0.05)
    assert rows["small"]["parameters"] == pytest.approx(rows["static"]["parameters"], rel=0.2)
    assert "topology.candidates" in (out / "report.html").read_text()


def test_a_common_step_count_stands_beside_and_planned_contrasts_are_shown(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "methods: [dense, static, gse]\nseeds: 2\nsparsities: [0.9]\nalso: [steps]\nplanned: [[gse, dense]]\n"
        "cadence: 50%\n"
    )
    out = tmp_path / "out"
    assert main(["compare", str(plan), "--out", str(out), *settings]) == 0
    found, shown = results(out), capsys.readouterr().out
    steps = {row["method"]: row["steps"] for row in found["rows"]}
    assert list(steps) == ["dense", "static", "gse", "dense@steps", "gse@steps"]
    assert steps["dense@steps"] == steps["gse@steps"] == steps["static"] == 24 > steps["dense"]
    (contrast,) = found["contrasts"]
    losses = {(row["method"], row["seed"]): row["test_loss"] for row in found["rows"]}
    assert contrast["difference"]["mean"] == pytest.approx(
        sum(losses["gse", n] - losses["dense", n] for n in (0, 1)) / 2
    )
    # The updates of GSE end at 60 % of its run: it makes one.
    warning = r"gse at sparsity 0\.9: one topology update in \d+ steps, too few"
    for text in (shown, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert re.search(warning, re.sub(r"\s+", " ", text))
        assert all(name in text for name in ("gse less dense", "gse@steps"))
    assert "further match over those there" in (out / "report.html").read_text()
    assert "1 (few)" in (out / "table.md").read_text()
    assert main(["report", str(out)]) == 0


def test_several_settings_are_tuned_in_trials_as_long_as_a_budget_carries(settings: list[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "methods: [dense, static]\nseeds: 1\nsparsities: [0.9]\ntuning:\n  learning_rates: [1.0e-3, 4.0e-3]\n"
        "  grid: {training.sparse_learning_rate: [4.0e-3, 1.6e-2], parameterization.initial_scale: [1, 2]}\n"
        "  extensions: 1\n  budget: 2\n"
    )
    out = tmp_path / "out"
    assert main(["compare", str(plan), "--out", str(out), *settings]) == 0
    found = results(out)
    # Dense has 3 trials, static 5, of one share of a run, as a scale of 1 is there anyway: what both runs take twice.
    assert found["trial_share"] == pytest.approx(2 * 2 / (3 + 5), rel=0.05)
    rows = {row["method"]: row for row in found["rows"]}
    for group in found["tuning"]:
        settings_of = [entry["setting"] for entry in group["looks"]]
        assert ("training.sparse_learning_rate" in settings_of) == (group["method"] == "static")
        row = rows[group["method"]]
        for trial in group["trials"]:
            assert trial["steps"] == pytest.approx(0.5 * row["steps"], abs=1)
        best = min(group["trials"], key=lambda trial: trial["validation_loss"])
        assert row["settings"] == group["settings"]
        assert best["settings"].items() <= row["settings"].items()
        runs = {trial["run"]: trial["train_flops"] for trial in group["trials"]}
        assert len(runs) == len(group["trials"])
        assert group["train_flops"] == sum(runs.values())
        run = (out / row["run"] / "config.yaml").read_text()
        for setting, value in row["settings"].items():
            assert re.search(rf"{setting.rpartition('.')[2]}: ({value:g}|{value})\b", run)
    assert "sparse learning rate" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert "the longest that the budget of tuning carries" in page
    assert f"and {len(list((out / 'tuning').iterdir()))} trials of tuning" in page
