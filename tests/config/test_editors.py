"""What editors check files by agrees with what the program takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.config import Config
from sparsae.config.editors import json_schema, plan_schema
from sparsae.config.load import resolve
from sparsae.config.shipped import methods, presets
from sparsae.config.text import dump, read_yaml
from sparsae.experiments.registry import KINDS

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]


def errors(schema: dict[str, Any], tree: Any) -> list[str]:
    return [error.message for error in validator(json.dumps(schema)).iter_errors(tree)]


@cache
def validator(schema: str) -> Any:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    return jsonschema.Draft202012Validator(json.loads(schema))


def shipped() -> Iterator[Path]:
    for folder in ("presets", "methods"):
        yield from sorted((ROOT / "src" / "sparsae" / "config" / folder).glob("*.yaml"))


def test_whatever_ships_and_whatever_is_written_fits() -> None:
    schema = json_schema()
    for file in shipped():
        assert errors(schema, read_yaml(file.read_text("utf-8"), str(file))) == [], file
    for method in methods():
        assert errors(schema, read_yaml(dump(resolve(method=method)), method)) == [], method
    several = ["data.sources=[{source: a.txt, weight: 3}]", 'rules={"*.attn.*": {rule: rigl, every: 5%}}']
    assert errors(schema, read_yaml(dump(resolve(method="set", overrides=several)), "rules")) == []


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"trainings": {}}, "trainings"),
        ({"training": {"stepz": 3}}, "stepz"),
        ({"training": {"schedule": "cosin"}}, "cosin"),
        ({"preset": "tine"}, "tine"),
        ({"method": "sparsea"}, "sparsea"),
        ({"topology": {"rule": "nothing"}}, "nothing"),
        ({"data": {"sources": [{"weight": 1}]}}, "source"),
    ],
)
def test_what_the_program_refuses_an_editor_marks(tree: dict[str, Any], said: str) -> None:
    assert any(said in message for message in errors(json_schema(), tree))


def test_every_committed_plan_fits_the_schema_of_its_kind() -> None:
    plans = [*(ROOT / "benchmarks").glob("*.yaml"), *(ROOT / "benchmarks" / "plans").glob("*.yaml")]
    plans += (ROOT / "docs" / "results").rglob("*.yaml")
    found = 0
    for file in plans:
        tree = read_yaml(file.read_text("utf-8"), str(file))
        if "preset" not in tree and "kind" not in tree:
            continue
        found += 1
        assert errors(plan_schema(KINDS[tree.get("kind", "comparison")].plan), tree) == [], file
    assert found > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_the_settings_of_runs(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", kind]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert errors(schema, {"seeds": 3, "preset": presets()[0], "settings": {"training": {"steps": 3}}}) == []
    assert errors(schema, {"settings": {"training": {"stepz": 3}}}) != []
    assert set(schema["$defs"]["Config"]["properties"]) == set(Config.model_fields)
