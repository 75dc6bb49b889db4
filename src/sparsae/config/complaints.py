"""One line for a setting that is wrong: where it was given, its dotted key, what is wrong and what would be right.

Whatever gives settings has an *origin*, by which a line says where to mend them: a name ("plan.yaml", "--steps"), or
what knows more of where each of its keys lies. A validator that compares several settings names them (`SettingError`).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pydantic_core import ErrorDetails, ValidationError

from sparsae.errors import DivergedError, InputError, called_by_keys
from sparsae.registry import IMPORT

Keys = tuple[str, ...]
Path = tuple[str | int, ...]  # keys, and places in lists
Origin = str | Callable[[Path], str]
P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="_HasGiven")
_DOTTED = re.compile(r"\b[a-z_]+(?:\.\w+)+")
_OF_GUESTS = ("method", "rule", "term")  # kinds that a file of the user's may have more of

_NOBODY = "settings"  # the origin of what nothing gave
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "int_from_float": "a whole number",
    "list_type": "a list",
    "tuple_type": "a list of two entries",
    "finite_number": "a finite number",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a section (key: value)"),
}


class SettingError(ValueError):
    """For validators of a section: what is wrong with settings that are fine by themselves.

    keys: dotted, from the section on, of those that could be mended; the line names where the last given one was given.
    """

    def __init__(self, what: str, *keys: str) -> None:
        super().__init__(f"{keys[0]}: {what}")
        self.what, self.keys = what, keys


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
    close = _abbreviated(name, known) or [other for other in known if len(name) > 2 and other.startswith(name)]
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"one of: {', '.join(known)}"


def _abbreviated(name: str, names: Iterable[str]) -> list[str]:
    """The names whose last part this is the first letters of: `training.lr` is short for `training.learning_rate`."""
    section, last = name.rpartition(".")[::2]
    parts = ((other, *other.rpartition(".")[::2]) for other in names)
    return [
        other
        for other, its_section, its_last in parts
        if "_" in its_last and its_section == section and "".join(word[:1] for word in its_last.split("_")) == last
    ]


def unknown_name(kind: str, name: Any, names: Iterable[str]) -> str:
    """What is wrong with the name of a thing of this kind ("rule") that does not exist."""
    hint = f" (one of your own: name its file by {IMPORT})" if kind in _OF_GUESTS else ""
    return f"no {kind} {shown(name)}; {nearest(str(name), names)}{hint}"


def unknown_key(keys: Keys, siblings: Iterable[str], everywhere: Iterable[str], rules: Sequence[str] = ()) -> str:
    """What is wrong with a key that does not exist: names near it beside it, or in other sections, or all beside it.

    rules: the other rules that have it, where this is a rule's section.
    """
    *section, name = keys
    beside = list(siblings)
    all_beside = f"{dotted(section) or 'the top level'} has: {', '.join(beside)}"
    ends = {key: key.rpartition(".")[2] for key in everywhere}
    if rules:
        return f"not a setting of this {dotted(section)}.rule, but of {', '.join(rules)}; {all_beside}"
    close = _abbreviated(str(name), beside) or difflib.get_close_matches(name, beside, n=2)
    found = [dotted((*section, match)) for match in close]
    if not found:
        close = difflib.get_close_matches(name, ends.values(), n=1, cutoff=0.75)
        found = [key for key, end in ends.items() if end in close]
    hint = f"did you mean {' or '.join(found)}?" if found else all_beside
    return f"no such setting; {hint}"


def explain(error: ErrorDetails, keys: Path, origins: Mapping[Keys, Origin]) -> str:
    """The whole line for one of pydantic's errors; `keys` is its location without the tags of unions."""
    found = error.get("ctx", {}).get("error")
    what = _what(error)
    if isinstance(found, SettingError):
        what, named = found.what, [(*keys, *key.split(".")) for key in found.keys]
        order = [None, *origins]  # of equals the first
        keys = max(named, key=lambda path: order.index(_giver(path, origins)))
    elif error["type"] == "missing":
        if isinstance(keys[-1], int):
            keys = keys[:-1]  # pydantic points at the entry that a list lacks
        else:
            section = keys if origin_of(keys, origins) else keys[:-1]
            return f"{placed(origin_of(section, origins) or _NOBODY, keys)}: must be given"
    elif keys[-1:] == ("[key]",):  # pydantic's name for a key of a mapping that is wrong itself
        keys, what = keys[:-2], f"key {shown(keys[-2])} {what}"
    return f"{located(keys, origins)}: {what}"


def below(key: str, error: ValueError) -> SettingError:
    """For validators: an error of what lies below a key."""
    keys = error.keys if isinstance(error, SettingError) else ()
    what = error.what if isinstance(error, SettingError) else str(error)
    return SettingError(what, *(f"{key}.{inner}" for inner in keys)) if keys else SettingError(what, key)


def within(errors: ValidationError, near: Callable[[Path], str] = lambda _: "") -> ValueError:
    """For validators: the first of the errors of settings inside those that are validated.

    near: what a line on a key that is not there ends with.
    """
    error = errors.errors(include_url=False)[0]
    keys, found = error["loc"], error.get("ctx", {}).get("error")
    if isinstance(found, SettingError):
        return SettingError(found.what, *(dotted((*keys, *key.split("."))) for key in found.keys))
    what = f"no such setting{near(keys)}" if error["type"] == "extra_forbidden" else _what(error)
    return SettingError(what, dotted(keys)) if keys else ValueError(what)


def origin_of(keys: Path, origins: Mapping[Keys, Origin]) -> Origin | None:
    """What gave a key, or was the last to give a key of a section; None: nothing did."""
    giver = _giver(keys, origins)
    return None if giver is None else origins[giver]


def located(keys: Path, origins: Mapping[Keys, Origin]) -> str:
    """Where a key was given, and its name there; of a section, the last origin that gave it or a key of it."""
    return placed(origin_of(keys, origins) or _NOBODY, keys)


@dataclass(frozen=True)
class Given:
    """Where settings were given, which is nothing that settings differ by."""

    origins: Mapping[Keys, Origin] = field(default_factory=dict, compare=False)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors from inside whose line names settings say where the last of them was given, as those of loading do."""
        try:
            with called_by_keys():
                yield
        except DivergedError:  # which is no setting's fault alone
            raise
        except InputError as error:
            line = str(error)
            named = [keys for name in _DOTTED.findall(line) if (keys := self._given(tuple(name.split("."))))]
            if named:
                keys = max(named, key=list(self.origins).index)
                place = placed(self.origins[keys], keys).removesuffix(f": {dotted(keys)}")
                if not line.startswith(place):
                    error.args = (f"{place}: {line}",)
            raise

    def _given(self, keys: Keys) -> Keys:
        """The keys, or the mapping of free names that they are an entry of, where that was given whole."""
        return next((part for part in (keys, keys[:-1]) if len(part) > 1 and part in self.origins), ())


class _HasGiven(Protocol):
    @property
    def given(self) -> Given: ...


def telling_places(function: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """For functions of settings: their errors say where the settings were given that they name."""

    @functools.wraps(function)
    def told(config: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with config.given.told():
            return function(config, *args, **kwargs)

    return told


def placed(origin: Origin, keys: Path) -> str:
    """An origin and the name that keys have there; the origin alone, where that says it: of an option so called."""
    if callable(origin):
        return origin(keys)
    name = dotted(keys)
    is_said = origin in (option_of(keys), option_of(keys[-1:])) or (": " in origin and origin.endswith(f".{name}"))
    return origin if is_said or not keys else f"{origin}: {name}"


def option_of(keys: Path) -> str:
    """The command line's name for a key."""
    return "--" + "-".join(key for key in keys if isinstance(key, str)).replace(".", "-").replace("_", "-")


def _what(error: ErrorDetails) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, not {shown(given)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        least = context["min_length"]
        return f"must have at least {least} {'entry' if least == 1 else 'entries'}, not {context['actual_length']}"
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


def _giver(keys: Path, origins: Mapping[Keys, Origin]) -> Keys | None:
    """Which given key says a key: the last one in a section, or the section or list that it is in itself."""
    names = tuple(key for key in keys if isinstance(key, str))
    inside = [given for given in origins if given[: len(names)] == names]
    around = [names[:n] for n in range(len(names)) if names[:n] in origins]
    return next((found[-1] for found in (inside, around) if found), None)
