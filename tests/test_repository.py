"""What the repository holds, and what it leaves to a command that writes it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsae.config.text import read_yaml

ROOT = Path(__file__).parents[1]


def tracked() -> list[Path]:
    """The files that git knows, or all files where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of the repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def values_of(tree: object, key: str) -> Iterator[Any]:
    """What stands under a key, at any depth."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, key)


def test_pages_are_written_and_not_kept() -> None:
    assert [file for file in tracked() if file.suffix == ".html"] == []


def test_no_file_of_code_is_longer_than_400_lines() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines())
        for file in tracked()
        if file.suffix == ".py"
    }
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_a_page_can_be_written_of_all_results_that_lie_here(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks" / "pages.py")
    assert spec
    assert spec.loader
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    found = pages.experiments(pages.RESULTS)
    assert len(found) > 10
    for file in found:
        page = pages.write(file, tmp_path / file.parent.name / file.stem)
        assert "</html>" in page.read_text("utf-8")


# What is said otherwise everywhere, and how.
DIALECT = {
    "connections are dropped and grown": r"come and go|come(s?) and go\1|go(es)? and (which |what )?come"
    r"|what (goes|went)( and| is|,|;|:|\.)|what (comes|came)( is|,|;|:|\.)|went and that came"
    r"|\b(weights?|connections?|units?|gradients?|ones|w\|) (go|come|went|came)\b(?! (to|from|with|through|by|on|in)\b)"
    r"|changed hands|other hands",
    "a grown weight ramps up": r"newborns?|newcomers?|\binfan(cy|t)|\bat birth\b",
    "`sparsae-written`": r"\bwritten method|method as (it was )?(first )?written",
    "a run is resumed, or continues": r"gone on with|\brun goes on\b|\bgoes on (training|with)\b",
    "a loop of your own": r"one's own loop",
    "a validator is called require_..., and a check is a command": r"\bdef _?(check|ensure|verify|checked)_\w+",
    "a method has hyphens": r"\b(dense_small|random_search)\b",
}
# Names where topologies change, of which the first of those words says little.
NAMES = re.compile(r"^\s*(?:def )?(?:self\.)?(goes|comes|going|went|came|may_go|may_come)\b(?= ?[:=(,])", re.MULTILINE)
SAYS = {"CHANGELOG.md", "tests/test_repository.py", "tests/golden.py", "tests/config/test_schema.py"}


def prose_of(file: Path) -> str:
    """A text whose sentences are unbroken, whatever lines they are wrapped into."""
    return " ".join(re.sub(r"^\s*(#|//) ?|\"\n\s*f?\"", "", file.read_text("utf-8"), flags=re.MULTILINE).split())


def worded() -> list[Path]:
    """Everything in which words are chosen: code, tests, settings and pages."""
    kinds = (".py", ".md", ".yaml", ".hpp", ".cpp")
    return [file for file in tracked() if file.suffix in kinds and str(file.relative_to(ROOT)) not in SAYS]


@pytest.mark.parametrize("rather", DIALECT)
def test_one_word_is_used_for_one_thing(rather: str) -> None:
    found = {
        str(file.relative_to(ROOT)): words
        for file in worded()
        if (words := [match[0] for match in re.finditer(DIALECT[rather], prose_of(file), re.IGNORECASE)])
    }
    assert found == {}, f"rather: {rather}"


def test_names_say_dropped_and_grown() -> None:
    names = {
        str(file.relative_to(ROOT)): words
        for file in worded()
        if file.is_relative_to(ROOT / "src" / "sparsae") and (words := NAMES.findall(file.read_text("utf-8")))
    }
    assert names == {}


def test_plans_name_their_data_by_a_variable() -> None:
    plans = [
        file for file in tracked() if file.is_relative_to(ROOT / "benchmarks") or file.is_relative_to(ROOT / "docs")
    ]
    # Task files of lm-eval are no plans: their data is a function's, which reads a variable.
    written = [file for file in plans if file.suffix == ".yaml" and file.parent.name != "lm_eval"]
    trees = [read_yaml(file.read_text("utf-8"), str(file)) for file in written]
    trees += [json.loads(file.read_text("utf-8")) for file in plans if file.suffix == ".json"]
    sources = [
        data[key]
        for tree in trees
        for data in values_of(tree, "data")
        for key in ("source", "validation_source")
        if key in data
    ]
    assert len(sources) > 20
    assert [source for source in sources if not source.startswith(("${", "stdlib", "hf:"))] == []


def test_workflows_only_call_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.stem for file in workflows] == ["docs", "tests", "wheels"]
    for file in workflows:
        commands = re.findall(r"^\s+- run: (.+)$", file.read_text("utf-8"), re.MULTILINE)
        assert commands, file
        for command in commands:
            called = re.fullmatch(r"make ([a-z-]+)( TORCH=\S+)?", command)
            assert called, f"{file.name}: '{command}' calls no target"
            assert called[1] in targets, f"{file.name}: the Makefile has no {called[1]}"


def test_supported_pythons_are_tested() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["classifiers"]
    supported = [
        line.rpartition(":: ")[2] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")
    ]
    tested = re.search(r"python: \[(.+)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))
    assert tested
    assert re.findall(r"3\.\d+", tested[1]) == supported
