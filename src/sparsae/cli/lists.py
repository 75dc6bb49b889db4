"""Options that take several values, with commas between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparsae.config.complaints import shown
from sparsae.errors import InputError

G = TypeVar("G")


def names_in(option: str, text: str, what: str = "name") -> list[str]:
    """The entries of a list with commas between. Raises InputError for an empty list."""
    if names := [name.strip() for name in text.split(",") if name.strip()]:
        return names
    raise InputError(f"{option}: give at least one {what}, or leave it out")


def numbers_in(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """The numbers of a list with commas between. Raises InputError for what is none, and for an empty list."""
    return [_number(option, word, kind) for word in names_in(option, text, "number")]


def if_given(text: str | None, read: Callable[[str], G]) -> G | None:
    """What is read from an option's text; None where the option was not given."""
    return None if text is None else read(text)


def _number(option: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option}: must be {what} with commas between, not {shown(text)}") from None


def seeds_in(text: str) -> float | list[float]:
    """A list of seeds, or how many."""
    found = numbers_in("--seeds", text, int)
    return found if "," in text else found[0]
