"""The kinds of experiments, each a folder here whose kind.py holds it as `KIND`. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sparsae.config.complaints import nearest
from sparsae.errors import InputError
from sparsae.experiments.kind import Kind


def _of_folders() -> Iterator[Kind]:
    for file in sorted(Path(__file__).parent.glob("*/kind.py")):
        yield import_module(f"{__package__}.{file.parent.name}.kind").KIND


KINDS: Mapping[str, Kind] = {name: kind for kind in _of_folders() for name in kind.names}


def kind_in(tree: Mapping[str, Any], where: str) -> Kind:
    """The kind that a plan or results of the file `where` have. Raises InputError where they have none."""
    name = tree.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(f"{where}: kind: no experiment is {name!r}; {nearest(str(name), KINDS)}")
    return KINDS[name]
