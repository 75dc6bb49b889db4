"""The documentation's site: every page is in its navigation, and a page that loads from another place is found out."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import sparsae
from sparsae.registry import RULES, TERMS
from sparsae.runs.rows import KINDS as ROWS

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def website(name: str) -> ModuleType:
    """A module of website/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "website" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    named = pages(SETTINGS["nav"])
    docs = ROOT / "docs"
    written = [page.relative_to(docs).as_posix() for page in docs.rglob("*.md")]
    played = [f"gallery/{script.stem}.md" for script in (ROOT / "examples").glob("*.py")]
    assert sorted(named) == sorted([*written, "gallery/index.md", *played])


PAGE = '<link rel="stylesheet" href="a.css"><script src="assets/b.js"></script><a href="https://c.org">c</a>{}'


@pytest.mark.parametrize(
    ("more", "style", "complaint"),
    [
        ("", "", None),
        ('<link rel="canonical" href="https://d.org/">', "a { background: url(data:image/png;base64,x) }", None),
        ('<script src="https://d.org/e.js"></script>', "", "https://d.org/e.js, which is another place's"),
        ('<script src="//d.org/e.js"></script>', "", "//d.org/e.js, which is another place's"),
        ('<link rel="preconnect" href="https://d.org">', "", "https://d.org, which is another place's"),
        ('<p style="background: url(https://d.org/f.png)">', "", "https://d.org/f.png, which is another place's"),
        ("<style>@import 'https://d.org/g.css'</style>", "", "https://d.org/g.css, which is another place's"),
        ("", "@font-face { src: url('https://d.org/h.woff') }", "https://d.org/h.woff, which is another place's"),
        ('<img src="i.png">', "", "i.png, which is not there"),
    ],
)
def test_what_a_page_loads_is_in_the_site(more: str, style: str, complaint: str | None, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(PAGE.format(more), encoding="utf-8")
    (tmp_path / "a.css").write_text(style, encoding="utf-8")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "b.js").touch()
    found = website("check").complaints(tmp_path)
    assert len(found) == (complaint is not None)
    assert not found or found[0].endswith(complaint)


REFERENCE = re.compile(r"^::: (sparsae[\w.]*)$", re.MULTILINE)


@functools.cache
def documented() -> dict[str, Any]:
    """What the reference has an entry for, by its name; of integrations, which import slowly, None."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    names = [name for page in pages for name in REFERENCE.findall(page.read_text("utf-8"))]
    assert len(names) == len(set(names))
    found = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module.startswith("sparsae.integrations."):
            source = (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").read_text("utf-8")
            assert re.search(rf"^(class|def) {attribute}\b", source, re.MULTILINE), name
            found[name] = None
        else:
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def test_the_reference_has_what_is_public() -> None:
    entries = documented()
    assert {f"sparsae.{name}" for name in sparsae.__all__} == {name for name in entries if name.count(".") == 1}
    things = {id(thing) for thing in entries.values()}
    for registry in (RULES, TERMS):
        missing = [name for name in registry.own_names() if id(registry[name].settings) not in things]
        assert not missing
    assert {id(kind) for kind in ROWS.values()} <= things


def test_what_the_reference_says_of_them_is_no_accidental_markup() -> None:
    """Stars in a docstring that are no code become emphasis, and vanish."""
    for name, thing in documented().items():
        for part in [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]:
            prose = re.sub(r"`[^`]*`", "", getattr(part, "__doc__", None) or "")
            assert not re.search(r"\*\S(.*\S)?\*", prose), f"{name}: {prose}"
