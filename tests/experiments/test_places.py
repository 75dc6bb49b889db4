"""Every line about a wrong value names where that was given: the file and the key in it, or the option."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsae.cli import experiments, main
from sparsae.cli.check import coordinates
from sparsae.config import Section
from sparsae.config.complaints import option_of
from sparsae.config.load import resolve, setting_names
from sparsae.errors import DivergedError, InputError
from sparsae.experiments.compare.lengths import RunLengths
from sparsae.experiments.compare.plan import ComparisonPlan, Tuning, Variant
from sparsae.experiments.coordinates.plan import CoordinatesPlan
from sparsae.experiments.plan import BasePlan, parse_plan, read_plan
from sparsae.experiments.transfer.plan import TransferPlan
from sparsae.registry import RULES, TERMS
from sparsae.train.divergence import diverged

WRONG: Any = [{"no": []}]  # of no setting's type
PLANS: dict[str, tuple[type[BasePlan], dict[str, Any]]] = {
    "comparison": (ComparisonPlan, {"methods": ["static", "set"]}),
    "transfer": (TransferPlan, {}),
    "coordinates": (CoordinatesPlan, {}),
}


def keys_of(plan: type[Section], inside: str = "") -> Iterator[str]:
    for name, field in plan.model_fields.items():
        yield f"{inside}{name}"
        if field.annotation is Tuning:
            yield from keys_of(Tuning, f"{inside}{name}.")
    if plan is ComparisonPlan:
        yield from (f"variants.mine.{name}" for name in Variant.model_fields)


def tree_of(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def merged(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    shared = [key for key in tree.keys() & other.keys() if isinstance(tree[key], dict) and isinstance(other[key], dict)]
    both = {key: merged(tree[key], other[key]) for key in shared}
    return tree | other | both


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def read(kind: str, tree: dict[str, Any], overrides: list[dict[str, Any]] | None = None) -> Any:
        plan, base = PLANS[kind]
        Path("plan.yaml").write_text(yaml.safe_dump(merged(base, tree)))
        return read_plan(Path("plan.yaml"), {}, overrides or [], plan)

    return read


def refused(call: Callable[[], Any], place: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert line.startswith(place), line
    assert not [sign for sign in ("\n", "Input should", "pydantic") if sign in line]
    assert " " in place.partition(": ")[2] or line[len(place)] in ":[.", line


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind, (plan, _) in PLANS.items() for key in keys_of(plan) if key != "kind"]
)
@pytest.mark.parametrize("wrong", [WRONG, -7, {"no": "x"}], ids=["list", "number", "section"])
def test_every_key_of_a_plan(kind: str, key: str, wrong: Any, read: Callable[..., Any]) -> None:
    base = {"variants": {"mine": {"method": "set"}}} if "mine" in key else {}
    if isinstance(wrong, dict) and key in ("settings", "variants.mine.settings"):
        plan, variant = read(kind, merged(base, tree_of(key, wrong))), "mine" if base else "static"
        is_grid = kind != "comparison"
        refused(lambda: plan.base()._model if is_grid else plan.config(variant, 0.9, 0), f"plan.yaml: {key}.no")
        return
    refused(lambda: read(kind, merged(base, tree_of(key, wrong))), f"plan.yaml: {key}")


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting, and what has to be said besides so that a run has it."""
    rules = {f"topology.{name}": rule for rule in RULES.own_names() for name in RULES[rule].settings.model_fields}
    for key in setting_names():
        above = ".".join(key.split(".")[:2])
        if key in ("preset", "method", "seed", "sparsity.sparsity", "topology.rule", "rules"):
            continue  # these are the plan's own
        yield key, ({"topology": {"rule": rules[above]}} if key.startswith("topology.") else {})


@pytest.mark.parametrize(("key", "besides"), list(settings()))
def test_every_setting_of_a_run(key: str, besides: dict[str, Any], read: Callable[..., Any]) -> None:
    tree = merged(besides, tree_of(key, WRONG))
    mine = {"method": "set", "settings": tree}
    refused(lambda: resolve(None, None, None, trees=[(tree, "here")]), f"here: {key}")
    plan = read("comparison", {"variants": {"mine": mine}})
    refused(lambda: plan.config("mine", 0.9, 0), f"plan.yaml: variants.mine.settings.{key}")
    if besides:
        return  # a plan gives rules by methods
    plan = read("comparison", {"settings": tree})
    refused(lambda: plan.config("set", 0.9, 0), f"plan.yaml: settings.{key}")
    plan = read("comparison", {"settings": {"training": {"beta1": 0.5}}}, [tree])
    refused(lambda: plan.config("set", 0.9, 0), f"--set: {key}")


# command -> option -> a value that is wrong; those of `NOT_THE_PLANS` say how the runs are executed.
FLAGS: dict[str, dict[str, str]] = {
    "compare": {
        "preset": "none", "methods": "none", "seeds": "0", "sparsities": "2", "match": "foo", "budget": "-1",
        "reference": "none", "learning-rates": "1e-3", "tuning-share": "2", "tuning-extensions": "99",
    },
    "ablate": {
        "preset": "none", "variants": "none", "method": "none", "seeds": "0", "sparsities": "2", "match": "foo",
        "budget": "0", "learning-rates": "0,1", "tuning-share": "0", "tuning-extensions": "-1",
    },
    "sensitivity": {
        "preset": "none", "method": "none", "modes": "none", "sequences": "0,1", "seeds": "-1", "sparsities": "0",
        "match": "foo", "budget": "0", "learning-rates": "0,1", "tuning-share": "0", "tuning-extensions": "-1",
    },
    "transfer": {
        "parameterizations": "none", "widths": "0", "sparsities": "1", "learning-rates": "-1,1",
        "initial-scales": "0,1", "embedding-multipliers": "0,1", "method": "dense", "heads": "none", "preset": "none",
        "seeds": "0",
    },
    "check coordinates": {
        "parameterizations": "none", "widths": "0", "sparsities": "1", "steps": "0", "layers": "0",
        "learning-rate": "0", "least-fan-in": "-1", "method": "none", "heads": "none", "seeds": "0", "preset": "none",
    },
}  # fmt: skip
NOT_THE_PLANS = {"given", "out", "settings", "jobs", "ray", "stack", "stack_size", "minutes", "dry_run", "json_file"}
COMMANDS = {
    **{name: getattr(experiments, name) for name in ("compare", "ablate", "sensitivity", "transfer")},
    "check coordinates": coordinates,
}
RENAMED = {"compared": "methods", "names": "variants"}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in FLAGS.items() for flag in flags])
def test_every_option_of_a_plan(
    command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparsae.experiments.compare.experiment.prepare", None)  # nothing is read before it is refused
    methods = ["--methods", "static"] if command == "compare" and flag != "methods" else []
    assert main([*command.split(), "--out", "out", *methods, f"--{flag}", FLAGS[command][flag]]) == 2
    assert capsys.readouterr().err.startswith(f"sparsae: error: --{flag}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_above_has_every_option(command: str) -> None:
    names = set(inspect.signature(COMMANDS[command]).parameters) - NOT_THE_PLANS
    assert {option_of((RENAMED.get(name, name),))[2:] for name in names} == set(FLAGS[command])


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"genes": {"drop_fraction": [0.1, 5]}}, "genes.drop_fraction: must be at most 1, not 5"),
        ({"genes": {"nothing": [0.1, 0.5]}}, "genes.nothing: nothing is no number of rule generations"),
        ({"genes": {"interval": [0.5, 2]}}, "genes.interval: must be at least 1 update"),
        ({"genes": {"drop_fraction": [0.5, 0.1]}}, "genes.drop_fraction: must be the least and the most"),
        ({"density": {"mlp": [0, 1]}}, "density.mlp: a factor must be above 0"),
        ({"density": {"mlp": 3}}, "density.mlp: must be the least and the most"),
        ({"trial": 1, "reach": 0}, "genes.interval: trial 1 and reach 0 must hold"),
    ],
)
def test_genes_and_densities_of_a_strategy(settings: dict[str, Any], place: str, read: Callable[..., Any]) -> None:
    mine = {"method": "sparsae-evolved", "settings": {"topology": {"strategy": settings}}}
    plan = read("comparison", {"variants": {"mine": mine}}, [{"training": {"steps": 30}}])
    with pytest.raises(InputError) as error:
        plan.config("mine", 0.9, 0)
    what = place.replace("genes.interval", "trial") if "trial" in settings else place
    assert str(error.value).startswith(f"plan.yaml: variants.mine.settings.topology.strategy.{what}"), str(error.value)


def test_a_conflict_is_told_where_it_was_given_last(read: Callable[..., Any]) -> None:
    plan = read("comparison", {"settings": {"sparsity": {"min_density": 0.05}}, "sparsities": [0.99]})
    refused(lambda: plan.config("set", 0.99, 0), "plan.yaml: sparsities: sparsity.sparsity: bounds")
    refused(lambda: resolve(overrides=["model.width=30", "model.heads=4"]), "--set: model.heads: width 30")
    options = {"--steps": ("training.steps", 5)}
    refused(lambda: resolve(overrides=["model.heads=3"], options=options), "--set: model.heads: width 256")


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"cadence": "1 epoch"}, "plan.yaml: cadence: topology.every: '1 epoch' is known only once the text is read"),
        ({"settings": {"topology": {"every": "1 epoch"}}}, "plan.yaml: settings.topology.every: '1 epoch'"),
        ({"settings": {"topology": {"ramp": "2 epochs"}}}, "plan.yaml: settings.topology.ramp: '2 epochs'"),
        ({"settings": {"sparsity": {"schedule": {"kind": "bump", "every": "1 epoch"}}}},
         "plan.yaml: settings.sparsity.schedule.every: '1 epoch'"),
    ],
)  # fmt: skip
def test_a_span_in_epochs(tree: dict[str, Any], place: str, read: Callable[..., Any]) -> None:
    plan = read("comparison", {"methods": ["set"], **tree})
    refused(lambda: plan.config("set", 0.9, 0), place)
    key = place.split(": ")[1].removeprefix("settings.")
    if "settings" in tree:
        path, value = f"--set: {key}", tree["settings"]
        refused(lambda: resolve(None, None, "set", trees=[(value, "--set")], counted_by="--dry-run"), path)


@pytest.mark.parametrize(
    ("tree", "advice"),
    [
        ({"budget": 1.0}, "raise plan.yaml: budget"),
        (
            {"tuning": {"budget": 1e-6}},
            "raise plan.yaml: tuning.budget (trials have 5e-07 of a run) or",
        ),
        ({"tuning": {"share": 1e-6}}, "raise plan.yaml: tuning.share or plan.yaml: settings.training.steps"),
    ],
)
def test_what_is_too_short_says_what_could_be_raised(
    tree: dict[str, Any], advice: str, read: Callable[..., Any]
) -> None:
    small = {"model": {"layers": 1, "width": 16, "heads": 2, "context": 16}, "training": {"steps": 20}}
    grid = {"learning_rates": [1e-3, 2e-3]}
    plan = read("comparison", {"methods": ["static"], "seeds": 1, "settings": small, **merged({"tuning": grid}, tree)})
    schedule = RunLengths(plan, lambda data: 300)
    with pytest.raises(InputError) as error:
        schedule.trial("static", 0.9, {"training.learning_rate": 1e-3})
    assert advice in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (
            {"learning_rates": [1e-3, 2e-3]},
            "plan.yaml: learning_rates: no such setting; did you mean tuning.learning_rates?",
        ),
        ({"training": {"steps": 3}}, "plan.yaml: training: no such setting; did you mean settings.training?"),
        (
            {"tuning": {"grid": {"training.lr": [1, 2]}}},
            "plan.yaml: tuning.grid.training.lr: no setting 'training.lr'; did you mean training.learning_rate?",
        ),
        ({"tuning": {"rate": 1}}, "plan.yaml: tuning.rate: no such setting; tuning has: learning_rates, grid"),
        ({"variants": {"a": {"metod": "set"}}}, "variants.a.metod: no such setting; did you mean variants.a.method?"),
        ({"variants": {"a": {}}}, "plan.yaml: variants.a.method: is needed"),
    ],
)
def test_a_key_that_is_elsewhere_or_misspelt_is_told(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        parse_plan({"methods": ["static"], **tree}, "plan.yaml", ComparisonPlan)


def test_what_is_foreseen_has_equal_settings_once_and_names_what_is_not_counted(read: Callable[..., Any]) -> None:
    small = {"model": {"layers": 1, "width": 16, "heads": 2, "context": 16}, "training": {"steps": 20}}
    tuning = {"learning_rates": [1e-3, 2e-3]}
    tree = {"methods": ["dense", "static"], "seeds": 2, "sparsities": [0.8, 0.9], "match": "steps"}
    twin = {"variants": {"twin": {"method": "static", "settings": {}}}}
    plan = read(
        "comparison", {**tree, **twin, "settings": small, "tuning": tuning, "tasks": {"names": ["rte"], "data": "glue"}}
    )
    planned = RunLengths(plan, lambda data: 300).planned()
    names = ["dense: trial", "static: trial", "static: trial", "dense", "static", "static"]
    assert [(each.what, each.runs) for each in planned] == [(name, 2) for name in names]
    assert [what.partition(" ")[0] for what in plan.uncounted()] == ["trials", "fine-tuning"]


@pytest.mark.parametrize("variants", [{}, {"twin": {"method": "static", "settings": {}}}])
def test_a_budget_of_trials_counts_those_of_equal_settings_once(variants: Any, read: Callable[..., Any]) -> None:
    small = {"model": {"layers": 1, "width": 16, "heads": 2, "context": 16}, "training": {"steps": 20}}
    tuning = {"learning_rates": [1e-3, 2e-3], "budget": 0.8}
    tree = {"methods": ["dense", "static"], "variants": variants, "seeds": 2, "match": "steps"}
    lengths = RunLengths(read("comparison", {**tree, "settings": small, "tuning": tuning}), lambda data: 300)
    assert lengths.trial_share == pytest.approx(0.8)  # two trials and two seeds of each
    assert sum(each.runs * each.steps for each in lengths.planned() if "trial" in each.what) == 4 * 16
    grid = {"parameterization.initial_scale": [1, 2]}  # the first is what all have anyway
    plan = read("comparison", {**tree, "settings": small, "tuning": {**tuning, "budget": 0.75, "grid": grid}})
    assert RunLengths(plan, lambda data: 300).trial_share == pytest.approx(0.5)  # three trials of each


@pytest.mark.parametrize("match", ["flops", "tokens", "steps"])
@pytest.mark.parametrize("every", [10, "2%"])
def test_a_budget_of_more_steps_than_a_run_may_have_is_refused(
    match: str, every: int | str, read: Callable[..., Any]
) -> None:
    small = {"model": {"layers": 1, "width": 16, "heads": 2, "context": 16}, "topology": {"every": every}}
    plan = read("comparison", {"methods": ["set"], "match": match, "budget": 1e30, "settings": small})
    with pytest.raises(InputError, match=r"more than 2,147,483,647 steps, .*: lower plan.yaml: budget"):
        RunLengths(plan, lambda data: 300).planned()


def test_a_long_run_is_counted_without_asking_at_each_of_its_steps(read: Callable[..., Any]) -> None:
    small = {"model": {"layers": 1, "width": 16, "heads": 2, "context": 16}, "training": {"steps": 2_000_000_000}}
    methods = ["sparsae", "static", "sparsae-written", "gmp", "granet", "dense"]
    share = {name: {"method": name, "settings": {"topology": {"every": "1%"}}} for name in methods[2:-1]}
    plan = read("comparison", {"methods": methods[:2] + methods[-1:], "variants": share, "settings": small})
    for each in RunLengths(plan, lambda data: 300).planned():
        assert each.steps > 100_000_000


def test_a_run_that_diverges_names_the_rate_of_its_sparse_values() -> None:
    training = resolve(overrides=["training.sparse_learning_rate=3.0"]).training
    error = diverged(training, "the loss is not finite", 7, 1)
    assert isinstance(error, DivergedError)
    assert "training.sparse_learning_rate (now 3)" in str(error)
    assert "sparse_learning_rate" not in str(diverged(resolve().training, "the loss is not finite", 7, 1))


SOURCES = sorted((Path(__file__).parents[2] / "src" / "sparsae").rglob("*.py"))


def test_validators_that_compare_settings_name_them() -> None:
    """Only they know of which keys a refusal is: another error would be placed at the section's last one."""
    seen = 0
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            if not any(mark.startswith("model_validator(mode='after')") for mark in marks):
                continue
            seen += 1
            raised = [ast.unparse(inner.exc) for inner in ast.walk(node) if isinstance(inner, ast.Raise) and inner.exc]
            assert all(error.startswith("SettingError(") for error in raised), f"{file.name}: {node.name}: {raised}"
    assert seen > 15


def test_terms_of_a_score_are_among_the_settings() -> None:
    assert any(name in key for key in setting_names() for name in TERMS.own_names())
