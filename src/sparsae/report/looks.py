"""How what is compared is drawn: each with its own colour and mark throughout a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsae.report.svg import Key

_DASHES = ("-", "--", ":", "-.")
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("p", "⬟"))


@dataclass(frozen=True)
class Look:
    """How one method is drawn."""

    colour: str
    dash: str
    marker: str
    symbol: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look for each method: eight colours, each with another mark and other dashes when it comes round again."""
    return {
        name: Look(f"series{i % 8}", _DASHES[i // 8 % 4], *_MARKS[(i + i // 8) % 8])
        for i, name in enumerate(dict.fromkeys(methods))
    }


def keys(look: Mapping[str, Look], shown: Sequence[str]) -> list[Key]:
    """A legend."""
    return [Key(name, look[name].colour, look[name].symbol) for name in look if name in shown]
