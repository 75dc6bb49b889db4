"""Settings that have no effect beside others, said where each is declared.

    window: Annotated[Span, Idle(lambda rule, _: rule.random_share == 1, "growth is random")] = 1

Who gives such a setting a value of its own is told; a plan's settings may be idle in some of its runs, not in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sparsae.config.complaints import Keys
from sparsae.config.walk import settings_in


@dataclass(frozen=True)
class Idle:
    """A setting, or all of a section but for some, has no effect where `when` holds, and why.

    when: of the section that it is declared in, and of the whole configuration around that.
    """

    when: Callable[[Any, Any], bool]
    why: str
    but: tuple[str, ...] = ()


def where_dense(but: tuple[str, ...] = ()) -> Idle:
    """A setting of sparse layers, which a dense model has not."""
    return Idle(lambda _, config: not config.sparsity.sparsity, "a dense model has no sparse layers", but)


def idle_settings(root: BaseModel) -> dict[Keys, str]:
    """The settings without effect in a configuration, and why."""
    found: dict[Keys, str] = {}
    sections: dict[Keys, Idle] = {}
    for keys, section, name in settings_in(root):
        for mark in type(section).model_fields[name].metadata:
            if isinstance(mark, Idle) and mark.when(section, root):
                if isinstance(getattr(section, name), BaseModel):
                    sections[keys] = mark
                else:
                    found.setdefault(keys, mark.why)
        if isinstance(getattr(section, name), BaseModel):
            continue
        for above, mark in sections.items():
            if len(keys) > len(above) and keys[: len(above)] == above and keys[len(above)] not in mark.but:
                found.setdefault(keys, mark.why)
    return found


def value_of(root: BaseModel, keys: Keys) -> Any:
    """A setting's value; raises KeyError or AttributeError where a configuration has no such setting."""
    value: Any = root
    for key in keys:
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


def is_default(root: BaseModel, keys: Keys) -> bool:
    """Whether a setting has the value that it has where nothing is said."""
    section, value = value_of(root, keys[:-1]), value_of(root, keys)
    if isinstance(section, dict):
        return False
    return bool(value == type(section).model_fields[keys[-1]].get_default(call_default_factory=True))
