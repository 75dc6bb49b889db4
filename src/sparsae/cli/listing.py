"""`sparsae methods`: what there is to train with, the rules of installed packages among them."""

from __future__ import annotations

from sparsae.cli.output import JsonFile, output, show_table
from sparsae.config.load import about, methods
from sparsae.errors import InputError
from sparsae.registry import RULES


def list_methods(json_file: JsonFile = None) -> None:
    """List the methods, and the rules of installed packages among them."""
    found = {}
    for name in methods():
        try:
            found[name] = about(name)
        except InputError as error:  # somebody else's package that cannot be loaded hides none of the others
            found[name] = f"cannot be used: {error}"
    with output(json_file) as result:
        result |= found
        if json_file != "-":
            own = set(RULES.own_names())
            rows = [(name, f"{text}{_origin(name, own)}") for name, text in found.items()]
            show_table("Methods", ("", ""), rows)


def _origin(name: str, own: set[str]) -> str:
    return f"  [from {RULES.origin(name)}]" if name in RULES.names() and name not in own else ""
