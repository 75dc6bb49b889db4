"""Where two trees of settings differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sparsae.config.complaints import shown


class Difference(NamedTuple):
    """A value that is another one there than here, by its dotted name; what one tree has not is null in it."""

    name: str
    there: str
    here: str


def differences(there: Any, here: Any, name: str = "") -> Iterator[Difference]:
    """All of them, in the order of the tree that is here; name: where the two trees lie in others."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**here, **there}:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield Difference(name, shown(there), shown(here))
