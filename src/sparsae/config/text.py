"""The YAML that settings are written in: a small strict dialect, read and written by one pair of functions.

YAML 1.1 turns `yes` into true, `010` into 8 and `1:30` into 90, and leaves `1e-3` a string. Here only `true` and
`false` are booleans, numbers are decimal (`1e-3` is one), keys are text and given once, and there are neither tags nor
aliases, which a few lines can make a billion values of.
"""

from __future__ import annotations

import math
import re
from enum import Enum
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from sparsae.config.complaints import shown
from sparsae.config.schema import Config
from sparsae.errors import InputError

_PLAIN = {  # tag -> (what a plain scalar must look like, its possible first characters)
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML declares it so
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor} is not allowed", event.start_mark)
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    pass


def _construct_mapping(reader: _Reader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = reader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {shown(key)} is not text", key_node.start_mark)
        if key in result:
            raise yaml.constructor.ConstructorError(None, None, f"key {shown(key)} is given twice", key_node.start_mark)
        result[key] = reader.construct_object(value_node, deep=True)
    return result


def _construct_bool(reader: _Reader, node: yaml.ScalarNode) -> bool:
    return str(node.value).lower() == "true"


def _construct_int(reader: _Reader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value)
    except ValueError:  # thousands of digits
        raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark) from None


def _construct_float(reader: _Reader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _refuse_tag(reader: _Reader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag} is not allowed", node.start_mark)


for _tag, (_pattern, _first) in _PLAIN.items():
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
for _tag, _constructor in {
    "null": lambda reader, node: None,
    "bool": _construct_bool,
    "int": _construct_int,
    "float": _construct_float,
    "str": lambda reader, node: node.value,
    "seq": lambda reader, node: [reader.construct_object(entry, deep=True) for entry in node.value],
    "map": _construct_mapping,
}.items():
    _Reader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)
_Reader.add_constructor(None, _refuse_tag)


def _represent_text(writer: _Writer, value: str) -> yaml.ScalarNode:
    """Quotes what our dialect would read as something else, and keeps every string on one line."""
    looks_otherwise = any(re.fullmatch(pattern, value) for pattern, _ in _PLAIN.values())
    style = '"' if looks_otherwise or value.splitlines() != [value] else None
    return writer.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Writer.add_representer(str, _represent_text)


def read_yaml(text: str, origin: str) -> Any:
    """The value of one YAML document; `origin` names it in the InputError that anything unreadable raises."""
    try:
        return yaml.load(text, Loader=_Reader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{origin}: {where}not YAML that settings can have: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{origin}: nested too deeply") from None


def dump(config: Config) -> str:
    """The settings as plain YAML, every key included; `resolve` reads it back to an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(tree: Any) -> str:
    """A tree as YAML that `read_yaml` reads back to an equal one."""
    return str(yaml.dump(tree, Dumper=_Writer, sort_keys=False, width=math.inf, allow_unicode=True))


def annotated(config: Config) -> str:
    """The settings as YAML, each with its explanation and choices; `resolve` reads it back to an equal Config."""
    lines = _annotated_lines(config, config.model_dump(mode="json"), "")
    return "\n".join(["# Every setting of this run, as resolved.", *lines]) + "\n"


def _annotated_lines(section: BaseModel, plain: dict[str, Any], indent: str) -> list[str]:
    """plain: the section as YAML can hold it."""
    lines = []
    for name, field in type(section).model_fields.items():
        if name not in plain:  # a field that its author excludes
            continue
        choices, parts = _choices(field.annotation), [field.description or ""]
        if len(choices) > 1:
            parts.append(f"one of {', '.join(choices)}")
        explained = "; ".join(filter(None, parts))
        lines.extend(_entry_lines(name, getattr(section, name), plain[name], explained, indent))
    return lines


def _entry_lines(key: str, value: Any, plain: Any, explained: str, indent: str) -> list[str]:
    if isinstance(value, BaseModel) and plain:
        return [
            f"{indent}{key}:{_comment(value.__doc__ or explained)}",
            *_annotated_lines(value, plain, indent + "  "),
        ]
    if isinstance(value, dict) and plain:
        inner = [
            line
            for entry, (name, leaf) in zip(value.values(), plain.items(), strict=True)
            for line in _entry_lines(inline(name), entry, leaf, "", indent + "  ")
        ]
        return [f"{indent}{key}:{_comment(explained)}", *inner]
    return [f"{indent}{key}: {inline(plain)}{_comment(' '.join(explained.split()))}"]


def _comment(text: str) -> str:
    """The first line of a text as the end of a line; nothing for a text that is empty."""
    first = text.strip().partition("\n")[0].rstrip()
    return f"  # {first}" if first else ""


def _choices(annotation: Any) -> tuple[str, ...]:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        values: tuple[Any, ...] = tuple(annotation)
    else:
        values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return tuple(inline(value.value if isinstance(value, Enum) else value) for value in values)


def inline(value: Any) -> str:
    """A scalar or a list as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.dump([plain], Dumper=_Writer, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip()[1:-1]  # inside brackets, a scalar is quoted wherever it must be
