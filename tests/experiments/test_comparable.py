"""Losses that are held against each other are of the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.config import Config, DataConfig
from sparsae.config.data import SourceConfig
from sparsae.config.held_out import HELD_OUT, held_out
from sparsae.experiments.compare.plan import ComparisonPlan, require_one_text
from sparsae.experiments.plan import parse_plan

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
    f"a grid of {setting}": ({setting: [300, 400]}, f"{setting}: decides which held-out tokens the losses are of")
    for setting in OTHER
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_grid_gives_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, told = WRONG[name]
    text = json.dumps({"methods": ["static"], "tuning": {"grid": grid}})
    (tmp_path / "plan.yaml").write_text(text)
    line = error_of(["compare", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")], capsys)
    assert f"plan.yaml: tuning.grid.{told}" in line
    assert not (tmp_path / "out").exists()
