"""Kinds of experiments are peers: each a folder under one registry, and the general part knows none of them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sparsae.experiments
from sparsae.cli import app
from sparsae.errors import InputError
from sparsae.experiments.directory import saved_plan
from sparsae.experiments.page import write_page
from sparsae.experiments.registry import KINDS

GENERAL = sorted(Path(sparsae.experiments.__file__).parent.glob("*.py"))
FOLDERS = {file.parent.name for file in Path(sparsae.experiments.__file__).parent.glob("*/__init__.py")}


def test_every_folder_is_a_kind() -> None:
    assert {type(kind).__module__.split(".")[-2] for kind in KINDS.values()} == FOLDERS
    assert set(KINDS) == {"comparison", "ablation", "sensitivity", "transfer", "coordinates"}


@pytest.mark.parametrize("file", GENERAL, ids=lambda file: file.name)
def test_the_general_part_names_no_kind(file: Path) -> None:
    texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    assert not {*KINDS, *FOLDERS}.intersection(filter(lambda text: isinstance(text, str), texts))


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_plan_is_read_by_its_own_kind(name: str, tmp_path: Path) -> None:
    more = {"methods": ["static"]} if "methods" in KINDS[name].plan.model_fields else {}
    plan = KINDS[name].plan.model_validate({"kind": name} | more)
    (tmp_path / "plan.yaml").write_text(plan.dump())
    assert saved_plan(tmp_path).model_dump() == plan.model_dump()
    assert type(saved_plan(tmp_path)) is KINDS[name].plan


@pytest.mark.parametrize("kind", ["comparisn", None, 3])
def test_no_such_kind(kind: object, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"kind: {json.dumps(kind)}\n")
    with pytest.raises(InputError, match="kind: no experiment is"):
        saved_plan(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"kind": kind, "rows": [{}]}))
    with pytest.raises(InputError, match="kind: no experiment is"):
        write_page(tmp_path)
    said = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(said.exception, InputError)
