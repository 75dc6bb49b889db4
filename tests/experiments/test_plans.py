"""The plans that lie ready are plans: every run of theirs has settings, and can be stacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.experiments.compare.plan import ComparisonPlan, cells, require_effect
from sparsae.experiments.jobs import job_of
from sparsae.experiments.plan import read_plan
from sparsae.experiments.stacked import refuse

PLANS = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_every_run_of_a_plan_has_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOKS", "books")
    plan = read_plan(file, {}, [], ComparisonPlan)
    require_effect(plan)
    for seed, sparsity, variant in cells(plan):
        if seed == plan.seeds[0]:
            refuse(job_of(f"{variant}-{sparsity:g}", plan.config(variant, sparsity, seed), 1))
