"""Whole runs under a density schedule: what they cost, whether they are resumed, what is refused."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.matching import Budget, Cost
from sparsae.experiments.plan import parse_plan
from sparsae.nn.linear import sparse_layers
from sparsae.train.forecast import forecast, untrained
from sparsae.train.run import resume, start
from tests.support.runs import config_of, rows, stopped_at, weights, write_text
from tests.support.schedules import every_kind, every_rule


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@every_rule
@every_kind
def test_a_run_costs_what_was_planned(
    name: str, kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsae.train.forecast.measured_flops_per_second", lambda config: 1e9)
    one = ["topology.candidates=1", "topology.proposer=rigl"] if name == "evolution" else []
    # A global ranking moves density between layers; a ramp counts each layer's steps, in 4 bytes that no forecast has.
    alike = {"gse": ["topology.scope=local"], "generations": ["topology.ramp=0"]}.get(name, [])
    config = config_of(
        text, text / "cache", f"sparsity.schedule.kind={kind}", "training.steps=24", *one, *alike, method=name
    )
    summary, expected = start(config, tmp_path / "run", quiet=True), forecast(config)
    assert summary["train_flops_by_part"] == expected["train_flops"]
    assert summary["nnz"] == summary["nnz_target"] == expected["density_steps"][-1]["nnz"]
    # The most that there ever was: a bump's beginning.
    assert summary["state_bytes_by_part"] == expected["state_bytes"]
    constant = forecast(config_of(text, text / "cache", "training.steps=24", *one, *alike, method=name))
    assert constant["density_steps"] == []
    ratio = expected["state_bytes"]["optimizer"] / constant["state_bytes"]["optimizer"]
    assert ratio == pytest.approx(2.0 if kind == "bump" else 1.0, rel=1e-3)
    student = expected["train_flops"]["student"] / constant["train_flops"]["student"]
    # Embeddings and attention are most of so small a model, and cost the same.
    assert (student > 1.02) if kind == "bump" else (student < 0.98)


@every_kind
@pytest.mark.parametrize("every", ["null", "3"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gse", ["scope=local"]),
        ("rigl", []),
        ("generations", ["random_share=0.0", "ramp=0"]),
        ("evolution", ["candidates=1", "proposer=rigl"]),
    ],
)
def test_windows_and_a_schedule_cost_what_was_planned(
    method: str, settings: list[str], every: str, kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsae.train.forecast.measured_flops_per_second", lambda config: 1e9)
    own = [f"topology.{setting}" for setting in [*settings, "window=4", "every=5"]]
    moving = [f"sparsity.schedule.{setting}" for setting in (f"kind={kind}", f"every={every}")]
    config = config_of(text, text / "cache", "training.steps=24", *own, *moving, method=method)
    summary, planned = start(config, tmp_path / "run", quiet=True), forecast(config)
    assert summary["train_flops_by_part"] == planned["train_flops"]
    assert planned["state_bytes"]["window"] > 0
    if kind == "bump":  # a restoring run grows where it is sparser than where it begins, with fewer sums
        assert summary["state_bytes_by_part"] == planned["state_bytes"]


def test_the_plan_in_the_docs_compares_densities_at_one_number_of_connections() -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text("utf-8")
    (block,) = [block for block in re.findall(r"(?:^    .*\n)+", page, re.M) if "static-roles" in block]
    compared = parse_plan(yaml.safe_load(textwrap.dedent(block)), "comparison.md", ComparisonPlan)
    layers: dict[str, list[tuple[str, int]]] = {}
    for variant in compared.all_variants:
        model = untrained(compared.config(variant, 0.9, 0), 300)
        layers[variant] = [(name, layer.topology.count) for name, layer in sparse_layers(model).items()]
    totals = {variant: sum(count for _, count in counted) for variant, counted in layers.items()}
    assert {totals[variant] for variant in totals if not variant.endswith("-bump")} == {totals["static"]}
    for what in ("roles", "depth", "bump"):
        assert layers[f"static-{what}"] == layers[f"rigl-{what}"] == layers[f"sparsae-{what}"] != layers["static"]


def test_a_bump_pays_for_its_beginning_with_steps() -> None:
    configs = [
        resolve(None, "demo", "set", ["topology.every=2%", *more]) for more in ([], ["sparsity.schedule.kind=bump"])
    ]
    plain, bump = (Cost(config, 300) for config in configs)
    budget = Budget("flops", plain.flops(250))
    steps = bump.steps(budget, "bump", "the budget")
    assert steps < 250
    assert bump.flops(steps) == pytest.approx(budget.amount, rel=0.005)


@every_kind
@pytest.mark.parametrize("name", ["rigl", "static", "sparsae-evolved"])
def test_a_stopped_run_goes_on_to_the_last_bit(name: str, kind: str, text: Path, tmp_path: Path) -> None:
    # A floor that holds in the middle: where the run is resumed it must not be held against a quarter of that.
    settings = [f"sparsity.schedule.kind={kind}", "sparsity.head_min_density=0.02", "teacher.enabled=true"]
    if name == "sparsae-evolved":
        settings += ["topology.every=2", "topology.window=2", "topology.window_every=1"]
    config = config_of(text, text / "cache", "training.steps=24", *settings, method=name)
    start(config, tmp_path / "whole", quiet=True)
    with stopped_at(11):
        assert not start(config, tmp_path / "run", quiet=True)["finished"]
    assert resume(tmp_path / "run", quiet=True)["finished"]
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("gmp", ["kind=bump"], "rule gmp prunes by a schedule of its own"),
        ("granet", ["kind=restore"], "rule granet prunes by a schedule of its own"),
        ("magnitude", ["kind=bump"], "rule magnitude prunes by a schedule of its own"),
        ("dense", ["kind=bump"], "sparsity must not be 0"),
        ("set", ["kind=bump", "factor=11"], "it must be at most 10"),
        ("set", ["kind=bump", "factor=1.0"], "factor 1 must be more than 1"),
        ("set", ["kind=restore", "factor=2.0"], "factor 2 must be less than 1"),
        ("set", ["factor=2.0"], "factor is not for kind constant"),
        ("set", ["kind=bump", "rise_stop=0.5"], "rise_stop is not for kind bump"),
        ("set", ["kind=bump", "stop=0.2"], "start 0.25 must come before stop 0.2"),
        ("set", ["kind=restore", "rise_start=0.1"], "stop 0.15 must come before rise_start 0.1"),
        ("set", ["kind=wave"], "schedule.kind"),
        ("set", ["kind=bump", "every=0"], "schedule.every"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(method: str, settings: list[str], says: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(None, "demo", method, [f"sparsity.schedule.{setting}" for setting in settings])
    assert says in str(error.value)
    assert "\n" not in str(error.value)
