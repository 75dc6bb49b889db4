"""Names are known without importing what they stand for, and each has one owner."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sparsae.cli.listing import list_methods
from sparsae.config.load import resolve
from sparsae.config.rules import RuleConfig, TermConfig
from sparsae.config.shipped import methods
from sparsae.errors import InputError
from sparsae.registry import RULES, Registry, import_files
from sparsae.rules import build_rule


class OneConfig(RuleConfig):
    """The settings of one thing."""


class OtherConfig(RuleConfig):
    """The settings of another."""


def test_rules_are_known_before_any_is_imported_and_need_no_torch_to_be() -> None:
    code = (
        "import sys; from sparsae.registry import RULES; names = RULES.names(); "
        "print([m for m in sys.modules if m.startswith('sparsae.rules')]); "
        "[RULES[n].settings().model_dump() for n in RULES.own_names()]; "
        "[RULES[n].build(RULES[n].settings()) for n in RULES.own_names()]; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_a_name_and_a_settings_class_have_one_owner() -> None:
    registry = Registry("rule", "sparsae.rules")
    registry.register("one", OneConfig)(lambda config: config)
    assert registry["one"].settings is OneConfig
    assert registry["one"].title == "The settings of one thing."
    assert registry.origin("one") == "test_registry.py"
    with pytest.raises(InputError, match="registered already"):
        registry.register("one", OtherConfig)(lambda config: config)
    with pytest.raises(InputError, match="settings of rule 'one', not of 'two'"):
        registry.register("two", OneConfig)(lambda config: config)
    with pytest.raises(InputError, match="registered already"):
        registry.register("rigl", OtherConfig)(lambda config: config)
    with pytest.raises(InputError, match="no rule 'nothing'"):
        registry["nothing"]


def test_settings_have_the_name_of_their_rule_and_no_other() -> None:
    assert RULES["rigl"].settings().rule == "rigl"
    with pytest.raises(InputError, match="rule must be rigl, not set"):
        RULES["rigl"].settings(rule="set")


def test_a_file_that_no_package_has_is_named_by_a_variable(tmp_path: Path) -> None:
    rule = tmp_path / "local_rule.py"
    rule.write_text(LOCAL)
    (tmp_path / "broken.py").write_text("1 / 0")

    def listed(*files: Path) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "SPARSAE_IMPORT": os.pathsep.join(map(str, files))}
        command = [sys.executable, "-m", "sparsae", "methods"]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    assert re.search(r"^ *local +Local things move\.", listed(rule).stdout, re.MULTILINE)
    for file, message in {"broken.py": "ZeroDivisionError", "absent.py": "no Python file"}.items():
        done = listed(tmp_path / file)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_settings_of_the_same_name_in_two_modules_are_not_the_same() -> None:
    registry = Registry("rule", "sparsae.rules")

    def config(module: str) -> type[RuleConfig]:
        return type("FooConfig", (RuleConfig,), {"__module__": module, "__qualname__": "FooConfig"})

    registry.register("foo", first := config("one"))(lambda config: config)
    with pytest.raises(InputError, match=r"registered already, with one\.FooConfig; two\.FooConfig wants another"):
        registry.register("foo", config("two"))(lambda config: config)
    assert registry["foo"].settings is first
    registry.register("foo", again := config("one"))(lambda config: config)  # its module, loaded anew
    assert registry["foo"].settings is again


@pytest.mark.parametrize("name", [name for name in methods() if name not in RULES.own_names()])
def test_no_rule_is_called_like_a_method_that_is_none(name: str) -> None:
    with pytest.raises(InputError, match=f"no rule can be called '{name}'"):
        RULES.register(name, OneConfig)


class Plain(BaseModel):
    """Settings of nothing."""


@pytest.mark.parametrize("settings", [int, Plain, TermConfig, RuleConfig, None, RuleConfig()])
def test_settings_are_a_class_of_their_own_of_their_kind(settings: Any) -> None:
    with pytest.raises(InputError, match="the settings of rule 'zz' must be a class of their own that inherits Rule"):
        Registry("rule", "sparsae.rules").register("zz", settings)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(InputError, match="needs a name"):
        Registry("rule", "sparsae.rules").register(name, OneConfig)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts packages with one module and its rules where they are found; forgets their modules afterwards."""
    before = set(sys.modules)
    for name in RULES.own_names():  # whose modules stay, so that their entries have to
        assert RULES[name].name == name

    def installed(package: str, code: str, *rules: str) -> None:
        site = tmp_path / package
        information = site / f"{package}-1.0.dist-info"
        information.mkdir(parents=True)
        (site / f"{package}_rules.py").write_text(code)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "".join(f"{rule} = {package}_rules\n" for rule in rules)
        (information / "entry_points.txt").write_text(f"[sparsae.rules]\n{points}")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setattr(RULES, "_known_points", None)
        monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))

    yield installed
    for name in set(sys.modules) - before:
        if name.endswith("_rules"):
            del sys.modules[name]


def two_rules(first: str, second: str) -> str:
    return LOCAL.replace('"local"', f'"{first}"') + LOCAL.replace('"local"', f'"{second}"').replace("Local", "Other")


def test_two_packages_with_one_name_are_both_named_and_hide_no_other(install: Callable[..., None]) -> None:
    install("hers", two_rules("shared", "hers"), "shared", "hers")
    install("his", two_rules("shared", "his"), "shared", "his")
    assert RULES["hers"].name == "hers"  # whose module registers the shared name as well
    for _ in range(2):
        with pytest.raises(InputError, match="rule 'shared' is an entry point of ") as caught:
            RULES["shared"]
        assert "hers (hers_rules)" in str(caught.value)
        assert "his (his_rules)" in str(caught.value)
    assert set(RULES.origin("shared").split(" and ")) == {"hers", "his"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise BaseException('a\\nb')", "BaseException: a b"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("1 / 0", "ZeroDivisionError"),
        ("import nothing_of_the_kind", "No module named"),
        ("def", "SyntaxError"),
    ],
)
def test_a_module_that_fails_is_named_and_hides_no_rule(
    code: str, message: str, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", f"{LOCAL.replace('local', 'broken')}\n{code}", "broken")
    install("fine", LOCAL.replace('"local"', '"fine"'), "fine")
    for _ in range(2):
        with pytest.raises(InputError, match="rule 'broken': the entry point broken = broken_rules") as caught:
            RULES["broken"]
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    list_methods()
    shown = capsys.readouterr().out
    assert "cannot be used: rule 'broken'" in shown
    assert "Local things move." in shown
    with pytest.raises(InputError, match="rule 'broken'"):
        resolve(None, None, "broken")


def test_a_person_who_interrupts_an_import_is_obeyed(install: Callable[..., None]) -> None:
    install("slow", "raise KeyboardInterrupt", "slow")
    with pytest.raises(KeyboardInterrupt):
        RULES["slow"]


def test_an_entry_point_called_like_a_method_takes_nothing_from_it(install: Callable[..., None]) -> None:
    install("greedy", LOCAL.replace('"local"', '"dense"'), "dense")
    assert "dense" not in RULES.names()
    assert resolve(None, None, "dense").sparsity.sparsity == 0
    with pytest.raises(InputError, match="no rule can be called 'dense', which is the name of a method"):
        RULES["dense"]


def test_files_that_a_variable_names_replace_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json.py", "queue.py", "leaves.py"):
        (tmp_path / name).write_text("raise SystemExit(3)")
        monkeypatch.setenv("SPARSAE_IMPORT", str(tmp_path / name))
        with pytest.raises(InputError, match="SystemExit: 3" if name == "leaves.py" else "give the file another name"):
            import_files()
    assert "leaves" not in sys.modules


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("config.evry", r"broken\.py:\d+: AttributeError: 'LocalConfig' object has no attribute 'evry'"),
        ('int("all")', r"broken\.py:\d+: ValueError: invalid literal"),
    ],
)
def test_a_mistake_in_what_makes_a_rule_is_told_with_its_place(
    wrong: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(LOCAL.replace('"local"', '"broken"').replace("CosineFraction(0.1)", wrong))
    monkeypatch.setenv("SPARSAE_IMPORT", str(tmp_path / "broken.py"))
    import_files()
    try:
        with pytest.raises(InputError, match=f"^rule 'broken' cannot be made: .*{told}"):
            build_rule(resolve(None, None, "broken").topology)
    finally:
        del sys.modules["broken"], RULES._entries["broken"]


LOCAL = """
from sparsae import RULES, CosineFraction, Exchange, Periodic, RandomDrop, RandomGrowth, RuleConfig


class LocalConfig(RuleConfig):
    'Local things move.'


@RULES.register("local", LocalConfig)
def build(config):
    return Exchange("local", when=Periodic("5%"), fraction=CosineFraction(0.1), drop=RandomDrop(), grow=RandomGrowth())
"""
