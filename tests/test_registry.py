"""Names are known without importing what they stand for, and each has one owner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsae.config import RuleConfig
from sparsae.errors import InputError
from sparsae.registry import RULES, Registry


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
    assert registry.origin("one") == "this program"
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
    with pytest.raises(ValueError, match="rule must be rigl, not set"):
        RULES["rigl"].settings(rule="set")


def test_a_file_that_no_package_has_is_named_by_a_variable(tmp_path: Path) -> None:
    rule = tmp_path / "local_rule.py"
    rule.write_text(LOCAL)
    (tmp_path / "broken.py").write_text("1 / 0")

    def methods(*files: Path) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "SPARSAE_IMPORT": os.pathsep.join(map(str, files))}
        command = [sys.executable, "-m", "sparsae", "methods"]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    assert "local            Local things move." in methods(rule).stdout
    for file, message in {"broken.py": "ZeroDivisionError", "absent.py": "no Python file"}.items():
        done = methods(tmp_path / file)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


LOCAL = """
from sparsae import RULES, CosineFraction, Exchange, Periodic, RandomDrop, RandomGrowth, RuleConfig


class LocalConfig(RuleConfig):
    'Local things move.'


@RULES.register("local", LocalConfig)
def build(config):
    return Exchange("local", when=Periodic("5%"), fraction=CosineFraction(0.1), drop=RandomDrop(), grow=RandomGrowth())
"""
