"""Losses that are held against each other are of the same tokens, and runs that are told apart are not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.config import Config, DataConfig
from sparsae.config.data import SourceConfig
from sparsae.config.held_out import HELD_OUT, held_out
from sparsae.experiments.compare.lengths import RunLengths
from sparsae.experiments.compare.plan import ComparisonPlan, require_one_text
from sparsae.experiments.plan import parse_plan
from sparsae.experiments.transfer.plan import TransferPlan
from sparsae.report.readable import sparsity_text

# A value of each setting that decides which tokens losses are of, another than that of the demo.
OTHER: dict[str, Any] = {
    "data.source": "other.txt", "data.sources": [{"source": "other.txt"}], "data.validation_source": "other.txt",
    "data.validation_share": 0.1, "data.text_field": "body", "data.max_documents": 3, "data.tokenizer": "other",
    "data.tokenizer_vocab": 300, "model.context": 32, "training.validation_sequences": 8,
    "training.test_sequences": 8,
}  # fmt: skip


def tree_of(setting: str, value: Any) -> dict[str, Any]:
    section, _, name = setting.partition(".")
    return {section: {name: value}}


def parsed(**tree: Any) -> ComparisonPlan:
    return parse_plan({"methods": ["static"], **tree}, "plan.yaml", ComparisonPlan)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that is refused."""
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsae: error")]
    return line


def test_every_setting_of_the_text_but_its_cache_is_among_them() -> None:
    assert set(OTHER) == set(HELD_OUT)
    changed = {name for name in DataConfig.model_fields if f"data.{name}" not in HELD_OUT}
    assert changed == {"cache"}
    sources = Config(data=DataConfig(sources=[SourceConfig(source="a"), SourceConfig(source="b")]))
    assert held_out(sources) != held_out(Config())
    assert held_out(Config(data=DataConfig(cache="elsewhere"))) == held_out(Config())


@pytest.mark.parametrize("setting", OTHER)
@pytest.mark.parametrize("more", [["--out", "out"], ["--dry-run"]], ids=["run", "dry run"])
def test_variants_whose_losses_are_of_other_tokens_are_refused(
    setting: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    variants = {"mine": {"method": "set", "settings": tree_of(setting, OTHER[setting])}}
    Path("plan.yaml").write_text(json.dumps({"methods": ["static"], "variants": variants}))
    line = error_of(["compare", "plan.yaml", *more], capsys)
    assert f"plan.yaml: variants.mine.settings.{setting}: the losses of mine would be of other held-out" in line
    assert line.endswith("than those of static: give it by settings, to all runs")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_the_variant_that_gives_the_setting_is_named_be_it_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"methods": ["static"], "variants": {"mine": {"method": "set", "settings": {"model": {"context": 32}}}}}
    (tmp_path / "plan.yaml").write_text(json.dumps(tree))
    line = error_of(["compare", str(tmp_path / "plan.yaml"), "--reference", "mine", "--dry-run"], capsys)
    assert "variants.mine.settings.model.context: the losses of mine would be of other held-out tokens" in line


@pytest.mark.parametrize(
    "settings",
    [
        {"training": {"batch_size": 4}},
        {"data": {"cache": "elsewhere"}},
        # As they are for all runs anyway.
        {"model": {"context": 256}},
        {"training": {"test_sequences": 128}},
    ],
)
def test_variants_may_differ_in_what_changes_no_held_out_token(settings: dict[str, Any]) -> None:
    require_one_text(parsed(variants={"mine": {"method": "set", "settings": settings}}))


def test_all_variants_may_have_another_text_together() -> None:
    settings = {"data": {"tokenizer_vocab": 300}}
    variants = {f"my-{name}": {"method": name, "settings": settings} for name in ("set", "rigl")}
    require_one_text(parse_plan({"variants": variants}, "plan.yaml", ComparisonPlan))


WRONG = {
    "a value that is infinite": (
        {"training.weight_decay": [0, float("inf")]}, "training.weight_decay[1]: must be a finite number, not inf"
    ),
    "a value that no float holds": (
        {"training.weight_decay": [0, 10**400]}, "training.weight_decay[1]: must be a finite number, not 10000"
    ),
    "a value that is text": (
        {"training.weight_decay": [0, "much"]}, "training.weight_decay[1]: must be a number, not 'much'"
    ),
    "a value that is true": ({"training.batch_size": [4, True]}, "training.batch_size[1]: must be a number, not true"),
    "values of one name": (
        {"training.weight_decay": [0.1, 0.1000000001]},
        "training.weight_decay: 0.1 and 0.1000000001 have the same six digits: leave one out",
    ),
    **{
        f"a grid of {setting}": ({setting: [300, 400]}, f"{setting}: decides which held-out tokens the losses are of")
        for setting in OTHER
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_grid_gives_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, told = WRONG[name]
    text = json.dumps({"methods": ["static"], "tuning": {"grid": grid}}).replace("Infinity", ".inf")
    (tmp_path / "plan.yaml").write_text(text)
    line = error_of(["compare", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")], capsys)
    assert f"plan.yaml: tuning.grid.{told}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (["compare", "--methods", "static", "--sparsities", "0.9,0.9000000001"], "--sparsities"),
        (["compare", "--methods", "static", "--learning-rates", "0.9,0.9000000001"], "--learning-rates"),
        (["transfer", "--sparsities", "0.9,0.9000000001"], "--sparsities"),
        (["transfer", "--learning-rates", "0.9,0.9000000001"], "--learning-rates"),
    ],
)
def test_numbers_that_no_name_tells_apart_are_refused(
    command: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of([*command, "--out", str(tmp_path / "out")], capsys)
    assert f"{place}: 0.9 and 0.9000000001 have the same six digits: leave one out" in line
    assert not (tmp_path / "out").exists()


def test_numbers_that_differ_in_six_digits_and_whole_ones_are_not() -> None:
    assert parsed(sparsities=[0.999, 0.999001]).sparsities == [0.999, 0.999001]
    assert parsed(seeds=[10**9, 10**9 + 1]).seeds == [10**9, 10**9 + 1]
    assert parse_plan({"widths": [1000000, 1000001]}, "plan.yaml", TransferPlan).widths == [1000000, 1000001]


def test_a_name_that_no_directory_could_have_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = "x" * 64
    assert longest in parsed(variants={longest: {"method": "set"}}).all_variants
    tree = {"methods": ["static"], "variants": {f"{longest}y": {"method": "set"}}}
    (tmp_path / "plan.yaml").write_text(json.dumps(tree))
    line = error_of(["compare", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")], capsys)
    assert "plan.yaml: variants: 'xxx" in line
    assert "has 65 characters, and names a directory: use at most 64" in line
    assert not (tmp_path / "out").exists()


def test_trials_of_many_settings_have_names_that_a_directory_can_have() -> None:
    numbers = ("beta1", "beta2", "epsilon", "weight_decay", "final_learning_rate", "sparse_learning_rate", "warmup")
    grid = {f"training.{name}": [0.123456, 0.223456] for name in numbers}
    plan = parsed(variants={"x" * 64: {"method": "static"}}, tuning={"grid": grid, "seed": 2**62})
    lengths = RunLengths(plan, lambda _: 4096)
    names = [lengths.trial("x" * 64, 0.9, point).name for point in lengths.grid("x" * 64, 0.9)]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 255
    assert names[0].endswith("-training.beta10.123456")


@pytest.mark.parametrize(
    ("sparsity", "text"), [(0, "0 %"), (0.9, "90 %"), (0.9995, "99.95 %"), (0.9999, "99.99 %"), (1 / 3, "33.3333 %")]
)
def test_sparsities_that_a_plan_tells_apart_are_shown_apart(sparsity: float, text: str) -> None:
    assert sparsity_text(sparsity) == text
