"""Settings that have no effect are refused with a reason; in a plan where they have none in any run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsae.cli import main
from sparsae.config.effect import Idle, idle_settings
from sparsae.config.load import resolve
from sparsae.config.schema import Config
from sparsae.config.shipped import methods
from sparsae.config.text import dump
from sparsae.config.walk import settings_in
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan, require_effect
from sparsae.experiments.grid import GridPlan
from sparsae.experiments.plan import parse_plan, read_plan
from sparsae.experiments.registry import KINDS
from sparsae.registry import RULES

# method, what is set, and the setting that does nothing then with its reason
IDLE = [
    ("sparsae", ["topology.window=20"], "topology.window: has no effect: random_share is 1"),
    ("sparsae", ["topology.sample_ratio=2.0"], "topology.sample_ratio: has no effect: random_share is 1"),
    ("sparsae", ["topology.window_every=2"], "topology.window_every: has no effect"),
    ("sparsae", ["topology.grow_temperature=0.5"], "topology.grow_temperature: has no effect"),
    ("sparsae", ["topology.strategy.trial=9"], "topology.strategy.trial: has no effect: strategy.fitness is none"),
    ("sparsae-evolved", ["topology.strategy.damage.share=0.2"], "damage.share: has no effect: damage.every is 0"),
    ("set", ["topology.ramp_first=true"], "topology.ramp_first: has no effect: ramp is 0"),
    ("gse", ["topology.window_every=3"], "topology.window_every: has no effect: window is one step"),
    ("evolution", ["topology.proposer=uniform", "topology.window=9"], "topology.window: has no effect: proposer is"),
    ("evolution", ["topology.burn_in.multiplier=2.0"], "burn_in.multiplier: has no effect: burn_in.steps is 0"),
    ("evolution", ["topology.micro_batch.pool=3"], "micro_batch.pool: has no effect: mode is not pooled"),
    ("evolution", ["topology.adaptation.factor=2.0"], "adaptation.factor: has no effect: adaptation.enabled is false"),
    ("sparsae-one", ["topology.proxy.standardize=true"], "topology.proxy.standardize: has no effect: one candidate"),
    ("sparsae-one", ["topology.micro_batch.sequences=8"], "topology.micro_batch.sequences: has no effect: one candid"),
    ("sparsae-one", ["topology.micro_batch.study=true"], "topology.micro_batch.study: has no effect: one candidate"),
    ("sparsae-guided", ["topology.reset.patience=9"], "topology.reset.patience: has no effect: boosted_probability"),
    ("sparsae-guided", ["topology.reset.boosted_updates=9"], "reset.boosted_updates: has no effect: boosted_probab"),
    ("sparsae-guided", ["topology.reset.redraw=0.1"], "topology.reset.redraw: has no effect: probability and boosted"),
    ("sparsae-guided", ["topology.reset.reshuffle=[0.1,0.2]"], "topology.reset.reshuffle: has no effect: probability"),
    ("sparsae", ["parameterization.base_width=64"], "parameterization.base_width: has no effect: name is sp"),
    ("sparsae", ["parameterization.scale_epsilon=false"], "parameterization.scale_epsilon: has no effect: name is sp"),
    ("set", ["parameterization.name=mup", "parameterization.base_density=0.5"], "base_density: has no effect: name is"),
    ("granet", ["topology.regeneration=0.0", "topology.accumulate=sum"], "topology.accumulate: has no effect: regen"),
    ("set", ["teacher.share=0.5"], "teacher.share: has no effect: there is no teacher"),
    ("set", ["teacher.every=2"], "teacher.every: has no effect: there is no teacher"),
    ("set", ["teacher.enabled=true", "teacher.tolerance=1e-6"], "teacher.tolerance: has no effect: only a union"),
    ("dense", ["training.sparse_learning_rate=0.01"], "training.sparse_learning_rate: has no effect: a dense model"),
    ("dense", ["training.mlp_keeps=bfloat16"], "training.mlp_keeps: has no effect: a dense model"),
    ("dense", ["sparsity.budget=uniform"], "sparsity.budget: has no effect: a dense model"),
    ("dense-small", ["training.sparse_learning_rate=0.01"], "training.sparse_learning_rate: has no effect"),
    ("dense-small", ["sparsity.schedule.kind=bump"], "sparsity.schedule.kind: has no effect: a dense model"),
    ("set", ["data.tokenizer=a.json", "data.tokenizer_vocab=300"], "data.tokenizer_vocab: has no effect: data.tok"),
    ("set", ["parameterization.weight_decay=coupled"], "parameterization.weight_decay: has no effect: name is sp"),
    ("set", ["tracking.project=mine"], "tracking.project: has no effect: no tracker is on"),
    ("set", ["tracking.tensorboard=true", "tracking.project=mine"], "tracking.project: has no effect"),
    ("set", ["data.validation_source=a.txt", "data.validation_share=0.1"], "data.validation_share: has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings", "line"), IDLE, ids=lambda value: str(value)[:60])
def test_a_run_is_told(
    method: str, settings: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", "--method", method, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsae: error: --set: ")
    assert line in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", methods())
def test_no_method_has_settings_of_its_own_that_are_told_and_its_runs_settings_run_again(
    method: str, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(resolve(method=method)))
    assert main(["train", str(file), "--print-config"]) == 0
    other = "set" if method != "set" else "rigl"
    assert main(["train", str(file), "--method", other, "--print-config"]) == 0


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sparsae", ["topology.random_share=0.5", "topology.window=20", "topology.window_every=2"]),
        ("sparsae-evolved", ["topology.window=30", "topology.sample_ratio=2.0"]),  # its share of random growth evolves
        ("sparsae-evolved", ["topology.strategy.fitness=none"]),  # the window is the method's
        ("sparsae", ["teacher.enabled=true", "teacher.share=0.5"]),
        ("sparsae", ["topology.window=1", "teacher.share=1.0"]),  # as they are anyway
        ("dense-small", ["sparsity.exclude=['*.c_fc']", "sparsity.unit=[4, 4]"]),  # count what is active
        ("sparsae", ["topology.strategy.damage.every=5", "topology.strategy.sequences=8"]),
    ],
)
def test_what_has_an_effect_is_taken(method: str, settings: list[str], capsys: Any) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", "--method", method, *given, "--print-config"]) == 0


def plan_of(tree: dict[str, Any], overrides: list[dict[str, Any]] | None = None) -> ComparisonPlan:
    file = Path("plan.yaml")
    file.write_text(yaml.safe_dump(tree))
    return read_plan(file, {}, overrides or [], ComparisonPlan)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"methods": ["dense", "dense-small"], "settings": {"training": {"sparse_learning_rate": 0.01}}},
         "plan.yaml: settings.training.sparse_learning_rate: has no effect: a dense model"),
        ({"methods": ["set", "static"], "settings": {"teacher": {"share": 0.5}}},
         "plan.yaml: settings.teacher.share: has no effect: there is no teacher"),
        ({"methods": ["set"], "variants": {"mine": {"method": "set", "settings": {"teacher": {"every": 3}}}}},
         "plan.yaml: variants.mine.settings.teacher.every: has no effect"),
        ({"methods": ["dense"], "tuning": {"grid": {"training.sparse_learning_rate": [0.1, 0.2]}}},
         "plan.yaml: tuning.grid.training.sparse_learning_rate: has no effect: no variant has it"),
    ],
)  # fmt: skip
def test_a_plan_is_told_what_has_no_effect_in_any_run(
    tree: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        require_effect(plan_of(tree))
    assert str(error.value).startswith(line)
    require_effect(plan_of(tree | {"methods": [*tree["methods"], "sparsae-guided"], "variants": {}}))


@pytest.mark.parametrize("kind", ["transfer", "coordinates"])
def test_a_grid_is_told_what_has_no_effect_in_any_run(kind: str, tmp_path: Path) -> None:
    def plan(method: str, sparsities: list[float]) -> GridPlan:
        tree = {"kind": kind, "method": method, "sparsities": sparsities, "learning_rates": [0.1, 0.2]}
        if kind == "coordinates":
            tree |= {"widths": [64, 128]}
            del tree["learning_rates"]
        read: GridPlan = parse_plan(
            tree | {"settings": {"topology": {"sample_ratio": 2.0}}}, "plan.yaml", KINDS[kind].plan
        )
        return read

    with pytest.raises(
        InputError, match=r"^plan.yaml: settings.topology.sample_ratio: has no effect: random_share is 1"
    ):
        plan("sparsae", [0.5, 0.9]).require_effect()
    plan("sparsae-guided", [0.5, 0.9]).require_effect()


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"also": ["flops"]}, "also"),
        ({"also": ["steps", "flops"]}, "also"),
        ({"match": "steps", "also": ["steps"]}, "also"),
        ({"tuning": {"share": 0.5}}, "tuning.share"),
        ({"tuning": {"budget": 2.0}}, "tuning.budget"),
        ({"tuning": {"learning_rates": [0.1, 0.2], "rounds": 2}}, "tuning.rounds"),
        ({"cadence": "5%", "settings": {"topology": {"every": 10}}}, "cadence"),
    ],
)
def test_keys_of_a_plan_without_effect(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"^plan\.yaml: {key}: has no effect: "):
        parse_plan({"methods": ["static", "set"], **tree}, "plan.yaml", ComparisonPlan)


def test_further_matches_with_rows_and_whole_plans_are_taken() -> None:
    plan = parse_plan({"methods": ["static", "set"], "also": ["steps", "tokens"]}, "plan.yaml", ComparisonPlan)
    assert parse_plan(plan.model_dump(mode="json"), "plan.yaml", ComparisonPlan) == plan


def test_a_runs_own_file_is_taken_with_what_came_of_another_run(tmp_path: Path) -> None:
    settings = "data: {tokenizer: a/tokenizer, tokenizer_vocab: 300}\nparameterization: {weight_decay: coupled}\n"
    (tmp_path / "config.yaml").write_text(settings)
    told = list[str]()
    resolve(tmp_path / "config.yaml", on_idle=told.extend)
    assert told == ["data.tokenizer_vocab", "parameterization.weight_decay"]
    (tmp_path / "manifest.json").write_text("{}")
    resolve(tmp_path / "config.yaml", on_idle=told.extend)
    assert len(told) == 2


def test_every_declaration_names_settings_and_says_why() -> None:
    seen = 0
    configs: list[Any] = [Config(topology=RULES[name].settings()) for name in RULES.own_names()]
    for config in [*configs, ComparisonPlan(methods=["static"])]:
        for _, section, name in settings_in(config):
            field = type(section).model_fields[name]
            for mark in (each for each in field.metadata if isinstance(each, Idle)):
                assert isinstance(mark.when(section, config), bool)
                assert mark.why
                assert not mark.but or set(mark.but) <= set(type(getattr(section, name)).model_fields)
                seen += 1
        assert isinstance(idle_settings(config), dict)
    assert seen > 50
