"""How the settings of a run are put together: defaults < preset < method < file < command line.

Every layer is a tree of given keys. They are merged key by key, and where each key came from is remembered, so that a
refusal can name the file or the option to mend. Sections of a rule or a term have the keys that it registered: a rule's
section names it, and starts anew where another is named; a term's is found under its name.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from sparsae.config.complaints import (
    Given,
    Keys,
    Origin,
    dotted,
    explain,
    located,
    origin_of,
    placed,
    shown,
    unknown_key,
    unknown_name,
)
from sparsae.config.data import STDLIB
from sparsae.config.effect import idle_settings, is_default, value_of
from sparsae.config.narrow import USED, narrowed, refuse_huge
from sparsae.config.ranges import is_span
from sparsae.config.rules import RuleConfig, TermConfig
from sparsae.config.schema import Config
from sparsae.config.section import Section, section_in
from sparsae.config.shipped import method_tree, methods, preset_tree, presets, rules_with
from sparsae.config.span import in_epochs
from sparsae.config.text import read_yaml
from sparsae.config.walk import settings_in
from sparsae.errors import InputError, require_utf8
from sparsae.files import expanded
from sparsae.registry import RULES, TERMS, method_named

Tree = dict[str, Any]
AnySection = TypeVar("AnySection", bound=Section)

_LARGEST_FILE = 1_000_000  # bytes; a longer one is somebody's corpus
_DEFAULT = Config()
_PATTERNS = ("data.source", "data.validation_source", "data.sources")


def has_sparsity(method: str) -> bool:
    """Whether a method leaves the sparsity to the run; `dense` does not. InputError if there is no such method."""
    layers = _Layers()
    layers.add_names(_DEFAULT.preset, method)
    return layers.tree.get("sparsity", {}).get("sparsity") != 0


def is_dense(method: str) -> bool:
    """Whether runs of a method have every connection, whatever sparsity is given. InputError as `has_sparsity`."""
    return resolve(method=method).sparsity.sparsity == 0


def setting_names() -> tuple[str, ...]:
    """The dotted names of all settings, those of every rule and term that is known here included."""
    return tuple(dict.fromkeys(_all_keys(Config, ())))


def resolve(
    file: Path | None = None,
    preset: str | None = None,
    method: str | None = None,
    overrides: Sequence[str] = (),
    *,
    options: Mapping[str, tuple[str, object]] | None = None,
    trees: Sequence[tuple[Mapping[str, Any], Origin]] = (),
    counted_by: str | None = None,
    on_idle: Callable[[Mapping[str, str]], None] | None = None,
) -> Config:
    """The settings of a run.

    A file may name its `preset:` and `method:`; the arguments win over those. The file's other keys stay, except where
    they only repeat the preset or method that is being replaced, and except its `topology` and `rules` when the method
    is: so a run's own config.yaml can be run again with another method.

    Args:
        file: YAML file, or None.
        preset, method: names that win over the file's; None: the file's, or else `demo` and `sparsae`.
        trees: further layers between file and overrides, in the form of a file, each with its origin.
        overrides: `section.key=value`, the value in YAML.
        options: command line options that stand for one key each: {"--steps": ("training.steps", 20)}.
        on_idle: called with the given settings that have no effect (`effect.py`), by dotted key, each with a line.
        counted_by: what counts the run's operations before its text is read, so that nothing can be in epochs.

    Raises:
        InputError: one line that names the key, where it was given, what is wrong and what would be right.
    """
    own = read_settings(file) if file else {}
    own_preset, own_method = _name(own, "preset", str(file)), _name(own, "method", str(file))
    layers = _Layers()
    layers.add_names(preset or own_preset or _DEFAULT.preset, method or own_method or _DEFAULT.method)
    if (own_preset and own_preset != layers.tree["preset"]) or (own_method and own_method != layers.tree["method"]):
        replaced = _Layers()
        replaced.add_names(own_preset or _DEFAULT.preset, own_method or _DEFAULT.method)
        if own_method and own_method != layers.tree["method"]:
            own.pop("topology", None)
            own.pop("rules", None)
        own = _without(own, replaced.config().model_dump(mode="json"))
    layers.add(own, str(file))
    for tree, origin in trees:
        layers.add(dict(tree), origin)
    for override in overrides:
        layers.add(parse_override(override), "--set")
    for option, (key, value) in (options or {}).items():
        layers.add(_nested(key.split("."), value), option)
    config = layers.config(counted_by)
    if on_idle is not None:
        # A run's own file has what an earlier version took, and what came of another run; and that of a run with
        # another method settings of which not all are of use.
        is_runs = file is not None and (file.parent / "manifest.json").is_file()
        is_other = is_runs or bool(own_method and own_method != config.method)
        on_idle(layers.idle(config, str(file) if is_other else None))
    return config


def with_absolute_paths(config: Config) -> Config:
    """The same settings wherever they are read from: a run can be resumed from any directory."""
    data = config.data
    found: Tree = {
        key: None if path is None else _absolute(path, f"data.{key}")
        for key in ("source", "validation_source", "tokenizer", "cache")
        for path in [getattr(data, key)]
    }
    found["sources"] = [
        each.model_copy(update={"source": _absolute(each.source, "data.sources")}) for each in data.sources
    ]
    return config.model_copy(update={"data": data.model_copy(update=found)})


def _absolute(path: str, key: str) -> str:
    """A path as it is from anywhere; what is no path as it is. A local folder may stand where the Hub's name does."""
    if path in (STDLIB, "train"):
        return path
    prefix, folder = ("hf:", path.removeprefix("hf:")) if path.startswith("hf:") else ("", path)
    folder = expanded(folder)
    if prefix and not os.path.isdir(folder.partition(":")[0]):
        return path
    # Of a pattern the place is none: a directory's own name may have brackets.
    may_be_pattern = key in _PATTERNS and not prefix and not os.path.exists(folder)
    place = glob.escape(os.getcwd()) if may_be_pattern and glob.has_magic(folder) else os.getcwd()
    absolute = prefix + os.path.normpath(os.path.join(place, folder))
    require_utf8(key, absolute)
    return absolute


class _Layers:
    """Layers merged so far: the keys that were given and, for each, where."""

    def __init__(self) -> None:
        self.tree: Tree = {}
        self.origins: dict[Keys, Origin] = {}

    def add_names(self, preset: str, method: str) -> None:
        method = method_named(method)
        self.add(preset_tree(preset), f"preset {preset}")
        self.add(method_tree(method), f"method {method}")
        self.tree |= {"preset": preset, "method": method}

    def add(self, given: Tree, origin: Origin) -> None:
        self._merge(self.tree, given, Config, (), origin)

    def _merge(self, tree: Tree, given: Tree, section: type[Section], path: Keys, origin: Origin) -> None:
        for name, value in given.items():
            field = section.model_fields.get(name)
            if field is None:
                keys = (*path, name)
                rules = rules_with(name) if issubclass(section, RuleConfig) else []
                what = unknown_key(keys, section.model_fields, _all_keys(Config, ()), rules)
                raise InputError(f"{placed(origin, keys)}: {what}")
            self._put(tree, value, field.annotation, (*path, name), origin)

    def _put(self, tree: Tree, value: Any, annotation: Any, keys: Keys, origin: Origin) -> None:
        """Merge one value, a section or a mapping of sections by its keys, into the tree of the section around it."""
        name, entries, section = keys[-1], _entries(annotation), section_in(annotation)
        if (entries is None and section is None) or (value is None and type(None) in get_args(annotation)):
            tree[name] = value
            # Keys below it are removed; its own moves to the end, so that the origins stay in the order of the layers.
            self._forget(keys)
            self.origins[keys] = origin
            return
        if entries is not None and section_in(entries) is RuleConfig and (value is None or value == {}):
            tree[name] = {}  # none at all: there is no other way to take back those of an earlier layer
            self._forget(keys)
            return
        if not isinstance(value, dict):
            raise InputError(f"{placed(origin, keys)}: must be a section (key: value), not {shown(value)}")
        if not value:  # an empty section has no key whose origin could be remembered
            self.origins[keys] = origin
        inner = tree[name] = tree.get(name) or {}
        if entries is not None:
            for key, entry in value.items():
                if entry is None and section_in(entries) is RuleConfig:
                    inner.pop(key, None)
                    self._forget((*keys, key))
                    continue
                self._put(inner, entry, entries, (*keys, key), origin)
        elif section is RuleConfig:
            inner = tree[name] = self._of_one_rule(inner, value, keys, origin)
            self._merge(inner, value, RULES[inner["rule"]].settings, keys, origin)
        elif section is TermConfig:
            if name not in TERMS:
                raise InputError(f"{placed(origin, keys)}: {unknown_name('term', name, TERMS.names())}")
            self._merge(inner, value, TERMS[name].settings, keys, origin)
        elif section is not None:
            self._merge(inner, value, section, keys, origin)

    def _of_one_rule(self, tree: Tree, given: Tree, keys: Keys, origin: Origin) -> Tree:
        current = tree.get("rule", _DEFAULT.topology.rule)
        rule = given.get("rule", current)
        if not isinstance(rule, str):
            raise InputError(f"{placed(origin, (*keys, 'rule'))}: must be the name of a rule, not {shown(rule)}")
        if rule not in RULES:
            raise InputError(f"{placed(origin, (*keys, 'rule'))}: {unknown_name('rule', rule, RULES.names())}")
        if rule == current:
            return {**tree, "rule": rule}
        self._forget(keys)
        return {"rule": rule}

    def _forget(self, keys: Keys) -> None:
        """Where a key and those below it came from."""
        self.origins = {key: where for key, where in self.origins.items() if key[: len(keys)] != keys}

    def config(self, counted_by: str | None = None) -> Config:
        config = self._validated(self.tree, Config, ())
        config._given = Given(self.origins)
        with config.given.told():
            refuse_huge(config)
            if counted_by is not None:
                self._refuse_epochs(config, counted_by)
            return narrowed(config)

    def idle(self, config: Config, besides: Origin | None) -> dict[str, str]:
        """The settings without effect that were given values of their own, by dotted key, each with a line.

        besides: the origin of further ones that are not told.
        """
        given = self._validated(self.tree, Config, ())  # of a narrower dense model, before it was that
        used = {("sparsity", name) for name in USED} if given != config else set()
        found = {keys: why for keys, why in idle_settings(config).items() if keys not in used}
        base: Config | None = None
        lines = {}
        for keys, why in found.items():
            origin = origin_of(keys, self.origins)
            if origin is None or origin in (f"preset {config.preset}", f"method {config.method}", besides):
                continue
            base = base or self._base(config)
            try:
                is_own = value_of(given, keys) != value_of(base, keys)
            except (KeyError, AttributeError):  # of another rule than the method's
                is_own = True
            if is_own and not is_default(given, keys):
                lines[dotted(keys)] = f"{placed(origin, keys)}: has no effect: {why}"
        return lines

    @staticmethod
    def _base(config: Config) -> Config:
        layers = _Layers()
        layers.add_names(config.preset, config.method)
        return layers._validated(layers.tree, Config, ())

    def _refuse_epochs(self, config: Config, counted_by: str) -> None:
        for keys, section, name in settings_in(config):
            if in_epochs(value := getattr(section, name)) and is_span(type(section).model_fields[name]):
                raise InputError(
                    f"{located(keys, self.origins)}: '{value}' is known only once the text is read, which {counted_by} "
                    "does not do: give steps or a share of the run (5%)"
                )

    def _validated(self, tree: Tree, section: type[AnySection], keys: Keys) -> AnySection:
        try:
            return section.model_validate(self._own_sections(tree, section, keys))
        except ValidationError as errors:
            error = errors.errors(include_url=False)[0]
            raise InputError(explain(error, (*keys, *error["loc"]), self.origins)) from None

    def _own_sections(self, tree: Tree, section: type[Section], path: Keys) -> Tree:
        """A section's tree in which what belongs to a rule or a term is validated by its own class."""
        return {
            name: self._own(value, section.model_fields[name].annotation, (*path, name)) for name, value in tree.items()
        }

    def _own(self, value: Any, annotation: Any, keys: Keys) -> Any:
        entries, section = _entries(annotation), section_in(annotation)
        if not isinstance(value, dict):
            return value
        if entries is not None:
            return {key: self._own(entry, entries, (*keys, key)) for key, entry in value.items()}
        if section is RuleConfig:
            return self._validated(value, RULES[value["rule"]].settings, keys)
        if section is TermConfig:
            return self._validated(value, TERMS[keys[-1]].settings, keys)
        return value if section is None else self._own_sections(value, section, keys)


def _entries(annotation: Any) -> Any:
    """What the entries of a mapping of sections are; None for anything else."""
    if get_origin(annotation) is not dict:
        return None
    entry = get_args(annotation)[1]
    return None if section_in(entry) is None else entry


def _all_keys(section: type[Section], path: Keys) -> Iterator[str]:
    for name, field in section.model_fields.items():
        keys, entries, inner = (*path, name), _entries(field.annotation), section_in(field.annotation)
        if entries is not None and section_in(entries) is TermConfig:
            for term in TERMS.own_names():
                yield from _all_keys(TERMS[term].settings, (*keys, term))
        elif inner is None:
            yield dotted(keys)
        elif inner is RuleConfig:
            for rule in RULES.own_names():
                yield from _all_keys(RULES[rule].settings, keys)
        else:
            yield from _all_keys(inner, keys)


def read_settings(file: Path) -> Tree:
    """The tree of keys in a YAML file. InputError if it cannot be read or is no tree."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        hint = f"give a YAML file{f', or a setting by --set {file}' if '=' in str(file) else ''}"
        raise InputError(f"{file}: cannot read these settings: {error.strerror}; {hint}") from None
    if len(content) > _LARGEST_FILE:
        raise InputError(f"{file}: too long for settings; give a YAML file of at most {_LARGEST_FILE:,} bytes")
    try:
        tree = read_yaml(content.decode("utf-8-sig"), str(file))
    except UnicodeDecodeError:
        raise InputError(f"{file}: not text in UTF-8; give a YAML file") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        hint = f"; text to train on is named by --set data.source={file}" if isinstance(tree, str) else ""
        raise InputError(f"{file}: must hold sections (key: value), not {shown(tree)}{hint}")
    return tree


def _name(tree: Tree, kind: str, origin: str) -> str | None:
    """Takes the preset's or method's name out of a file's tree."""
    if kind not in tree:
        return None
    name = tree.pop(kind)
    names = presets() if kind == "preset" else methods()
    known = method_named(name) if kind == "method" and isinstance(name, str) else name
    if known not in names:
        raise InputError(f"{origin}: {kind}: {unknown_name(kind, name, names)}")
    return str(known)


def _without(tree: Tree, repeated: Mapping[str, Any]) -> Tree:
    """The tree without the leaves that say what `repeated` says."""
    kept: Tree = {}
    for key, value in tree.items():
        same = repeated.get(key)
        if isinstance(value, dict) and isinstance(same, dict):
            kept[key] = _without(value, same)
        elif key not in repeated or value != same:
            kept[key] = value
    return kept


def parse_override(override: str) -> Tree:
    """`section.key=value` as a tree of one key. InputError if it has another form."""
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise InputError(f"--set: must be section.key=value, such as training.steps=100, not {shown(override)}")
    if not text.strip():
        raise InputError(f"--set: {key}: no value after '='; write null for none")
    if names in (["preset"], ["method"]):
        raise InputError(f"--set: {key}: cannot be set this way; use --{key} NAME")
    try:
        return _nested(names, read_yaml(text, f"--set: {key}"))
    except InputError as error:
        if text.lstrip()[0] not in "*&!%@`[{|>" or set(text) & {"'", '"', "\n"} or len(text) > 200:
            raise
        raise InputError(f"{error}; as text it wants quotes of its own: --set '{key}=\"{text}\"'") from None


def _nested(names: Sequence[str], value: object) -> Tree:
    tree: Any = value
    for name in reversed(names):
        tree = {name: tree}
    return tree
