"""The plans that lie ready, that pages show, and that results are of, are plans: every run of theirs has settings."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from sparsae.config.text import read_yaml
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan, cells, require_effect, require_one_text
from sparsae.experiments.jobs import job_of
from sparsae.experiments.plan import parse_plan, read_plan
from sparsae.experiments.stacked import refuse
from sparsae.experiments.transfer.plan import TransferPlan
from sparsae.experiments.transfer.sweep import Sweep

ROOT = Path(__file__).parents[2]
READY = sorted((ROOT / "benchmarks" / "plans").glob("*.yaml"))
RESULTS = sorted((ROOT / "docs" / "results").rglob("*.yaml"))
# The indented blocks of the page that begin as a plan does.
SHOWN = re.findall(r"^    preset:.*\n(?:    .*\n)+", (ROOT / "docs" / "comparison.md").read_text("utf-8"), re.MULTILINE)
COMPARED, SWEPT = (
    [file for file in RESULTS if (read_yaml(file.read_text("utf-8"), str(file)).get("kind") == "transfer") == swept]
    for swept in (False, True)
)


@pytest.fixture(autouse=True)
def books(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOKS", "books")


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_every_run_of_a_plan_can_be_stacked(file: Path) -> None:
    plan = read_plan(file, {}, [], ComparisonPlan)
    require_effect(plan)
    require_one_text(plan)
    for seed, sparsity, variant in cells(plan):
        if seed == plan.seeds[0]:
            refuse(job_of(f"{variant}-{sparsity:g}", plan.config(variant, sparsity, seed), 1))


@pytest.mark.parametrize("block", SHOWN, ids=range(len(SHOWN)))
def test_a_plan_that_the_page_shows_has_settings_for_every_run(block: str) -> None:
    plan = parse_plan(read_yaml(dedent(block), "comparison.md"), "comparison.md", ComparisonPlan)
    require_effect(plan)
    require_one_text(plan)
    assert all(plan.config(variant, sparsity, seed) for seed, sparsity, variant in cells(plan))


@pytest.mark.parametrize("file", COMPARED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_comparison_of_the_results_can_be_made_again(file: Path) -> None:
    plan = read_plan(file, {}, [], ComparisonPlan)
    runs = [(variant, sparsity, seed) for seed, sparsity, variant in cells(plan) if seed == plan.seeds[0]]
    assert runs
    require_effect(plan)
    require_one_text(plan)
    for variant, sparsity, seed in runs:
        plan.config(variant, sparsity, seed)


@pytest.mark.parametrize("file", SWEPT, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_sweep_of_the_results_can_be_made_again(file: Path) -> None:
    plan = read_plan(file, {}, [], TransferPlan)
    points = [point for point in plan.points() if point.seed == plan.seeds[0]]
    assert points
    plan.require_effect()
    for point in points:
        plan.config(point)


def sweep(sparsities: list[float], more: str) -> Sweep:
    settings = read_yaml(f"{{model: {{width: 128, heads: 2}}, {more}}}", "here")
    plan = {"kind": "transfer", "method": "rigl", "widths": [128], "sparsities": sparsities, "settings": settings}
    return Sweep(parse_plan({**plan, "learning_rates": [1e-3, 2e-3]}, "here", TransferPlan), lambda _: 512)


@pytest.mark.parametrize(
    "more",
    [
        "topology: {every: 2}",
        "rules: {'*mlp*': {rule: set}}",
        "sparsity: {schedule: {kind: bump}}",
        "sparsity: {max_density: 0.9}",
    ],
)
def test_settings_of_connections_are_of_the_sparse_runs_of_a_grid_and_of_nothing_where_there_are_none(
    more: str,
) -> None:
    sweep([0.0, 0.5], more)
    with pytest.raises(InputError, match="has no effect: every run is dense"):
        sweep([0.0], more)
