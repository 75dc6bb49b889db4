"""Records: frozen dataclasses that are written as JSON objects and read back by the same class. Needs no torch.

Fields are written in their order, under their own names. A number that is not finite is written as null, and null is
read as NaN where a field is a `float`, as None where it may be None. Keys that no field has are left out in reading, so
that what another version wrote more can be read, unless a field is open: that one holds them, in its place. What
earlier versions did not write needs a default.
"""

from __future__ import annotations

import collections.abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsae.config.complaints import dotted, shown
from sparsae.errors import InputError

Record = TypeVar("Record")
Reader = Callable[[object], Any]
_OPEN, _LEFT_OUT = "open", "left out"


def open_field() -> Any:
    """A mapping of all keys that are no other field's, written among the fields in its place."""
    return field(default_factory=dict, metadata={_OPEN: True})


def left_out_field() -> Any:
    """A field that may be None, and then is not written."""
    return field(default=None, metadata={_LEFT_OUT: True})


def encode(record: object) -> dict[str, Any]:
    """A record as a JSON object."""
    content: dict[str, Any] = {}
    for each in fields(record):  # type: ignore[arg-type]
        value = _encoded(getattr(record, each.name))
        if _OPEN in each.metadata:
            content |= value
        elif value is not None or _LEFT_OUT not in each.metadata:
            content[each.name] = value
    return content


def decode(kind: type[Record], value: object, origin: str) -> Record:
    """The record that `encode` made an object of.

    Raises InputError, which names the origin and the field, for what is none.
    """
    try:
        found: Record = _reader_of_record(kind)(value)  # type: ignore[arg-type]
    except _WrongError as wrong:
        place = dotted(reversed(wrong.keys))
        raise InputError(
            f"{origin}: {place}{': ' if place else ''}{wrong}; the file is damaged, or of another version of sparsae"
        ) from None
    return found


def field_names(kind: type[Any]) -> tuple[str, ...]:
    """What the fields of a class of records are called in files; an open one has no name of its own."""
    return tuple(each.name for each in fields(kind) if _OPEN not in each.metadata)


def _encoded(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value):
        return encode(value)
    if isinstance(value, Mapping):
        return {key: _encoded(entry) for key, entry in value.items()}
    return [_encoded(entry) for entry in value] if isinstance(value, list | tuple) else value


class _WrongError(Exception):
    """What a value must be; `keys` lead to it, the last one first."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.keys: list[str | int] = []

    @classmethod
    def of(cls, wanted: str, value: object) -> Self:
        return cls(f"must be {wanted}, not {shown(value)}")

    def inside(self, key: str | int) -> Self:
        self.keys.append(key)
        return self


@cache
def _reader_of_record(kind: type[Any]) -> Reader:
    @cache
    def known() -> tuple[list[tuple[str, Reader, bool]], dict[str, Reader]]:
        """(name, reader, whether it may be missing) of each field, and the open one; a record may hold its own kind."""
        hints, named, more = get_type_hints(kind), [], dict[str, Reader]()
        for each in fields(kind):
            if _OPEN in each.metadata:
                more[each.name] = _reader(get_args(hints[each.name])[1])
            else:
                has_default = each.default is not MISSING or each.default_factory is not MISSING
                named.append((each.name, _reader(hints[each.name]), has_default))
        return named, more

    def read(value: object) -> Any:
        if not isinstance(value, Mapping):
            raise _WrongError.of("an object", value)
        named, more = known()
        content: dict[str, Any] = {}
        name = ""
        try:
            for name, reader, may_be_missing in named:
                if name in value:
                    content[name] = reader(value[name])
                elif not may_be_missing:
                    raise _WrongError("is missing")
        except _WrongError as wrong:
            raise wrong.inside(name) from None
        for name, reader in more.items():
            others = value.keys() - {own for own, *_ in named}
            content[name] = _mapping(reader)({key: value[key] for key in value if key in others})
        try:
            return kind(**content)
        except ValueError as error:  # fields that are right each by itself
            raise _WrongError(str(error)) from None

    return read


@cache
def _reader(hint: Any) -> Reader:
    """What reads a value of a type. Raises TypeError for a type that no record can have."""
    outer, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if hint in _SCALARS:
        return _SCALARS[hint]
    if outer in (Union, UnionType) and len(inner) == 2 and type(None) in inner:
        reader = _reader(next(each for each in inner if each is not type(None)))
        return lambda value: None if value is None else reader(value)
    if outer is Literal:
        return _choice(inner)
    if outer is tuple and inner[1:] == (...,):
        return _list(_reader(inner[0]))
    if outer is collections.abc.Mapping and inner[0] is str:
        return _mapping(_reader(inner[1]))
    if is_dataclass(hint) and isinstance(hint, type):
        return _reader_of_record(hint)
    raise TypeError(f"no record can have a field of type {hint}")


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongError.of("a number or null", value)
    return value  # a whole one stays whole, so that it is written as it was


def _scalar(kind: type[Any], wanted: str) -> Reader:
    def read(value: object) -> Any:
        if type(value) is not kind:  # true is no whole number
            raise _WrongError.of(wanted, value)
        return value

    return read


_SCALARS: Mapping[Any, Reader] = {
    float: _number,
    int: _scalar(int, "a whole number"),
    str: _scalar(str, "text"),
    bool: _scalar(bool, "true or false"),
}


def _choice(known: Sequence[Any]) -> Reader:
    def read(value: object) -> Any:
        if value not in known:
            raise _WrongError.of(" or ".join(map(shown, known)), value)
        return value

    return read


def _list(reader: Reader) -> Reader:
    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _WrongError.of("a list", value)
        found: list[Any] = []
        try:
            for entry in value:
                found.append(reader(entry))
        except _WrongError as wrong:
            raise wrong.inside(len(found)) from None
        return tuple(found)

    return read


def _mapping(reader: Reader) -> Reader:
    def read(value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _WrongError.of("an object", value)
        found: dict[str, Any] = {}
        key = ""
        try:
            for key, entry in value.items():
                found[key] = reader(entry)
        except _WrongError as wrong:
            raise wrong.inside(key) from None
        return found

    return read
