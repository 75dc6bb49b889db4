"""`sparsae presets | methods | rules`: what there is to train with, the rules of installed packages among it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

import typer

from sparsae.cli.output import JsonFile, output, show_table
from sparsae.config.shipped import about, about_preset, methods, presets
from sparsae.errors import InputError
from sparsae.registry import RULES


def complete(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell offers for a name that was begun."""

    def offered(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return offered


Preset = Annotated[
    str | None,
    typer.Option(help=f"Model and run: {', '.join(presets())}.  (default: demo)", autocompletion=complete(presets)),
]


def list_presets(json_file: JsonFile = None) -> None:
    """List the presets: a model and a length of training each."""
    _show("Presets", _told(presets(), about_preset), json_file)


def list_methods(json_file: JsonFile = None) -> None:
    """List the methods, and the rules of installed packages among them."""
    _show("Methods", _told(methods(), about), json_file)


def list_rules(json_file: JsonFile = None) -> None:
    """List the topology rules, those of installed packages among them."""
    _show("Rules", _told(RULES.names(), lambda name: RULES[name].title), json_file)


def _told(names: Iterable[str], about: Callable[[str], str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = about(name)
        except InputError as error:  # somebody else's package that cannot be loaded hides none of the others
            found[name] = f"cannot be used: {error}"
    return found


def _show(title: str, found: Mapping[str, str], json_file: str | None) -> None:
    with output(json_file) as result:
        result |= found
        if json_file != "-":
            own = set(RULES.own_names())
            show_table(title, ("", ""), [(name, f"{text}{_origin(name, own)}") for name, text in found.items()])


def _origin(name: str, own: set[str]) -> str:
    return f"  [from {RULES.origin(name)}]" if name in RULES.names() and name not in own else ""
