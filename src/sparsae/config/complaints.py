"""One line for a setting that is wrong: where it was given, its dotted key, what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

Keys = tuple[str, ...]

_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list of two entries",
    "finite_number": "a finite number",
}


def dotted(keys: Iterable[str | int]) -> str:
    """`("sparsity", "unit", 0)` as `sparsity.unit[0]`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def shown(value: Any) -> str:
    """A given value as its writer would recognize it, at most 60 characters long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def nearest(name: str, names: Iterable[str]) -> str:
    """`did you mean a or b?`, or, where nothing is near, all the names."""
    known = list(names)
    close = [other for other in known if len(name) > 2 and other.startswith(name)]
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"one of: {', '.join(known)}"


def unknown_key(keys: Keys, siblings: Iterable[str], everywhere: Iterable[str]) -> str:
    """What to say of a key that does not exist: names near it beside it, else in other sections, else all beside it."""
    *section, name = keys
    beside = list(siblings)
    all_beside = f"{dotted(section) or 'the top level'} has: {', '.join(beside)}"
    ends = {key: key.rpartition(".")[2] for key in everywhere}
    if dotted(keys) in ends:
        return f"{dotted(keys)}: not a setting of this {dotted(section)}.rule; {all_beside}"
    close = difflib.get_close_matches(name, beside, n=2)
    found = [dotted((*section, match)) for match in close]
    if not found:
        close = difflib.get_close_matches(name, ends.values(), n=1, cutoff=0.75)
        found = [key for key, end in ends.items() if end in close]
    hint = f"did you mean {' or '.join(found)}?" if found else all_beside
    return f"{dotted(keys)}: no such setting; {hint}"


def explain(error: ErrorDetails, keys: tuple[str | int, ...], origins: Mapping[Keys, str]) -> str:
    """The whole line for one of pydantic's errors; `keys` is its location without the tags of unions."""
    origin = _origin(keys[:-1] if keys[-1:] == ("[key]",) or error["type"] == "missing" else keys, origins)
    line = f"{origin}: "
    what = _what(error)
    if error["type"] == "missing":
        if isinstance(keys[-1], int):
            keys = keys[:-1]  # pydantic points at the entry that a list lacks
        else:
            what = "must be given"
    elif keys[-1:] == ("[key]",):  # pydantic's name for a key of a mapping that is wrong itself
        keys, what = keys[:-2], f"key {shown(keys[-2])} {what}"
    names = [key for key in keys if isinstance(key, str)]
    if keys and [f"--{name.replace('_', '-')}" for name in names] != [origin]:  # an option may be all of the key
        line += f"{dotted(keys)}: "
    return line + what


def _what(error: ErrorDetails) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, not {shown(given)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected']}, not {shown(given)}"
    if kind in ("missing", "too_long"):
        return f"must have exactly two entries, not {shown(given)}"
    if kind == "string_too_short":
        return "must not be empty"
    bounds = {
        "greater_than_equal": "at least",
        "less_than_equal": "at most",
        "greater_than": "above",
        "less_than": "below",
    }
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"must be {bounds[kind]} {limit if isinstance(limit, int) else f'{limit:g}'}, not {shown(given)}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, not {shown(given)}"


def _origin(keys: tuple[str | int, ...], origins: Mapping[Keys, str]) -> str:
    """Where a key was given; of a section, the last layer that gave it or a key of it."""
    names = tuple(key for key in keys if isinstance(key, str))
    inside = [origin for given, origin in origins.items() if given[: len(names)] == names]
    return inside[-1] if inside else "settings"
