"""Presets and methods by name: what ships with the package as files of settings, and rules as methods."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from importlib import resources
from typing import Any

from sparsae.config.complaints import unknown_name
from sparsae.config.text import read_yaml
from sparsae.errors import InputError
from sparsae.registry import METHODS, RULES, method_named


def presets() -> tuple[str, ...]:
    """Names of the presets that ship with the package."""
    files = (resources.files("sparsae.config") / "presets").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def methods() -> tuple[str, ...]:
    """Names of the methods: those that ship with the package, and every rule, which is a method without a teacher."""
    return tuple(sorted({*METHODS, *RULES.names()}))


def rules_with(setting: str) -> list[str]:
    """Names of the rules that have a setting of this name."""
    return [name for name in RULES.own_names() if setting in RULES[name].settings.model_fields]


def about(method: str) -> str:
    """One sentence on a method: of its file, or of the rule that it is. InputError if there is no such method."""
    method = method_named(method)
    return _first_line("methods", method) if method in METHODS else RULES[method].title


def about_preset(preset: str) -> str:
    """One sentence on a preset that ships with the package, of its file."""
    return _first_line("presets", preset)


def preset_tree(name: str) -> dict[str, Any]:
    """The settings of a preset, as its file has them. InputError if there is no such preset."""
    _require_known("preset", name, presets())
    return _read("presets", name)


def method_tree(name: str) -> dict[str, Any]:
    """The settings of a method, as its file has them or as the rule that it is. InputError if there is none."""
    _require_known("method", name, methods())
    return _read("methods", name) if name in METHODS else {"topology": {"rule": name}, "teacher": {"enabled": False}}


def _require_known(kind: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InputError(unknown_name(kind, name, names))


def _read(folder: str, name: str) -> dict[str, Any]:
    return deepcopy(_parsed(folder, name))


@cache
def _parsed(folder: str, name: str) -> Any:
    return read_yaml(_text(folder, name), f"{folder.removesuffix('s')} {name}")


def _first_line(folder: str, name: str) -> str:
    return _text(folder, name).partition("\n")[0].removeprefix("# ")


def _text(folder: str, name: str) -> str:
    return (resources.files("sparsae.config") / folder / f"{name}.yaml").read_text("utf-8")
