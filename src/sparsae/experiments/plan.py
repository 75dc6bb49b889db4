"""What a plan of any kind says, and how it is read from a YAML file and the command line. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as File
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from sparsae.config import Config, Section
from sparsae.config.complaints import Keys, Origin, Path, SettingError, dotted, explain, nearest, option_of, unknown_key
from sparsae.config.effect import idle_settings, is_default
from sparsae.config.load import read_settings
from sparsae.config.section import OrHowMany
from sparsae.config.shipped import presets
from sparsae.config.text import dump_yaml
from sparsae.errors import InputError

# What runs can have in common.
Match = Literal["flops", "tokens", "steps"]
Tree = dict[str, Any]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class BasePlan(Section):
    """What every experiment's plan says."""

    kind: str = Field(description="what is asked")
    preset: str = Field(default="demo", description="model and run")
    seeds: Annotated[list[Seed], OrHowMany] = Field(default=[0, 1, 2], min_length=1, description="seeds, or how many")
    settings: Tree = Field(default={}, description="settings of every run, in the form of a settings file")
    _origins: Mapping[Keys, str] = PrivateAttr(default_factory=dict)

    def place(self, *keys: str | int) -> str:
        """Where a key of the plan was given: "plan.yaml: tuning.share", or "--tuning-share"."""
        return _place(self._origins, keys)

    def origin(self, *section: str) -> Origin:
        """What knows where the keys of a tree of settings lie, which is this section of the plan."""
        return lambda keys: self.place(*section, *keys)

    @field_validator("preset")
    @classmethod
    def _preset_is_known(cls, preset: str) -> str:
        if preset not in presets():
            raise ValueError(f"no preset '{preset}'; {nearest(preset, presets())}")
        return preset

    @model_validator(mode="after")
    def _lists_repeat_nothing(self) -> Self:
        for name in type(self).model_fields:
            values = getattr(self, name)
            if isinstance(values, list) and (what := alike(values)):
                raise SettingError(what, name)
        return self

    @model_validator(mode="after")
    def _settings_leave_the_rest(self) -> Self:
        refuse_said(self.settings, "settings", self.said())
        return self

    @model_validator(mode="after")
    def _all_has_effect(self) -> Self:
        for keys, why in idle_settings(self).items():
            if not is_default(self, keys):
                raise SettingError(f"has no effect: {why}", dotted(keys))
        return self

    def said(self) -> dict[str, str]:
        """Settings that the plan itself gives to every run, and by which of its keys."""
        return {"seed": "seeds", "preset": "preset"}

    def uncounted(self) -> list[str]:
        """What of the plan a forecast of its runs leaves out."""
        return []

    def dump(self) -> str:
        """The plan as YAML, every key included."""
        return dump_yaml(self.model_dump(mode="json"))


P = TypeVar("P", bound=BasePlan)


def given(tree: Mapping[str, Any], setting: str) -> bool:
    """Whether a tree of keys says something of a setting."""
    inner: Any = tree
    for key in setting.split("."):
        if not isinstance(inner, Mapping) or key not in inner:
            return False
        inner = inner[key]
    return True


def alike(values: Sequence[Any]) -> str | None:
    """What is wrong with a list that has a value twice, or two numbers that are told apart by no name of a run.

    Names have six digits of a number, and tables no more.
    """
    seen: dict[Any, Any] = {}
    for value in values:
        key = float(f"{value:.6g}") if isinstance(value, float) else value
        if key in seen:
            if seen[key] == value:
                return "one is given twice"
            return f"{seen[key]} and {value} have the same six digits: leave one out"
        seen[key] = value
    return None


def refuse_said(tree: Mapping[str, Any], where: str, said: Mapping[str, str]) -> None:
    """SettingError where settings name one that the plan gives: the run would not be what it is called."""
    for key, said_by in said.items():
        if given(tree, key):
            raise SettingError(leave_out(key, said_by), f"{where}.{key}")


def leave_out(setting: str, said_by: str) -> str:
    """What is wrong with a setting that the plan gives by this key of its own, or by what it is."""
    option = f" ({option_of((said_by,))})" if said_by.isidentifier() else ""
    return f"leave out {setting}, which the plan gives by {said_by}{option}"


def refuse_in_common(idle: Sequence[Mapping[str, str]]) -> None:
    """InputError for the first setting that has no effect in any of some runs.

    idle: of each run, the settings that have none, and a line that says why.
    """
    for key, line in idle[0].items() if idle else ():
        if all(key in other for other in idle):
            raise InputError(line)


def read_plan(
    file: File | None, options: Mapping[str, tuple[str, object]], overrides: Sequence[Tree], plan: type[P]
) -> P:
    """The plan of a file, of options that win over it, and of settings that win over both.

    options: by their names, {"--tuning-share": ("tuning.share", 0.5)}, the dotted key of the plan and its value.
    Raises InputError: one line that names what is wrong, where it was given, and what would be right.
    """
    tree = read_settings(file) if file else {}
    origins: dict[Keys, str] = {(): str(file) if file else "the command line"}
    for option, (key, value) in options.items():
        *sections, last = key.split(".")
        inner = tree
        for name in sections:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise InputError(f"{file}: {name}: must be a section (key: value)")
        inner[last] = value
        origins[*sections, last] = option
    settings = tree.setdefault("settings", {})
    for override in overrides:
        if isinstance(settings, dict):
            _merge(settings, override)
            origins |= {("settings", *keys): _OVERRIDE for keys in _leaves(override)}
    return parse_plan(tree, origins, plan)


_OVERRIDE = "--set"


def parse_plan(tree: Mapping[str, Any], where: str | Mapping[Keys, str], plan: type[P]) -> P:
    """A plan from the tree of its keys. where: its home, or those of its keys, for the InputError of a wrong one."""
    origins: Mapping[Keys, str] = {(): where} if isinstance(where, str) else where

    def place(keys: Path) -> str:
        return _place(origins, keys)

    try:
        found = plan.model_validate(tree)
    except ValidationError as errors:
        every = errors.errors(include_url=False)
        # A key that is misspelt may be the one that is missing.
        error = next((each for each in every if each["type"] == "extra_forbidden"), every[0])
        keys = tuple(str(key) for key in error["loc"])
        if error["type"] == "extra_forbidden":
            known = unknown_key(keys, _around(plan, keys).model_fields, _names(plan))
            if len(keys) == 1 and keys[0] in Config.model_fields:
                known = f"no such setting; did you mean settings.{keys[0]}?"
            raise InputError(f"{place(keys)}: {known}") from None
        if error["type"] == "missing":
            raise InputError(f"{place(keys)}: is needed") from None
        raise InputError(explain(error, error["loc"], dict.fromkeys(origins, place))) from None
    found._origins = origins
    return found


def _place(origins: Mapping[Keys, str], keys: Path) -> str:
    """Where the key of a plan was given, and its name there."""
    names = tuple(key for key in keys if isinstance(key, str))
    said = next((names[:n] for n in range(len(names), 0, -1) if names[:n] in origins), ())
    if not said:
        return ": ".join(filter(None, (origins.get((), "the plan"), dotted(keys))))
    if origins[said] == _OVERRIDE:
        return f"{_OVERRIDE}: {dotted(keys[1:])}"  # which says no `settings`
    return ": ".join((origins[said], *filter(None, [dotted(names[len(said) :])])))


def _leaves(tree: Tree) -> Iterator[Keys]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ((key, *keys) for keys in _leaves(value))
        else:
            yield (key,)


def _around(section: type[Section], keys: Sequence[str]) -> type[Section]:
    """The section that the last of these keys is in; keys that name an entry of a list or mapping have none."""
    for key in keys[:-1]:
        if key in section.model_fields:
            section = _section_in(section.model_fields[key].annotation) or section
    return section


def _names(section: type[Section]) -> Iterator[str]:
    """The dotted names of what a section has, and of what its own sections have."""
    for name, field in section.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from (f"{name}.{inner}" for inner in _names(field.annotation))


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner)) is not None), None)


def _merge(tree: Tree, other: Tree) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
