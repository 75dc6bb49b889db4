"""Names under which things are found: in this package, in installed ones, and in the running program.

A topology rule or a term of a score is one file that registers what it holds under its own name. The registry knows
names without importing anything: they are the names of a package's files, and those of entry points. A file is imported
when what it holds is first wanted, so that a command which does not want it stays quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from sparsae.errors import InputError

IMPORT = "SPARSAE_IMPORT"  # names files, separated as in PATH

Built = TypeVar("Built", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered thing: its name, the class of its settings, and what makes it from them."""

    name: str
    settings: type[Any]
    build: Callable[[Any], Any]

    @property
    def title(self) -> str:
        """The first line of what its author wrote about it."""
        return (self.settings.__doc__ or "").strip().partition("\n")[0]


class Registry:
    """Entries of one kind ("rule"): the modules of `package`, entry points of the group `package`, and `register`."""

    def __init__(self, kind: str, package: str, reserved: frozenset[str] = frozenset()) -> None:
        """reserved: names that none may have."""
        self.kind, self._package, self.reserved = kind, package, reserved
        self._entries: dict[str, Entry] = {}
        self._known_points: dict[str, metadata.EntryPoint] | None = None

    def names(self) -> tuple[str, ...]:
        """Every known name, sorted; imports nothing of what they stand for."""
        return tuple(sorted({*self.own_names(), *self._points(), *self._entries}))

    def own_names(self) -> tuple[str, ...]:
        """Names of those that this package itself has."""
        folder = Path(__file__).parent / self._package.partition(".")[2]
        return tuple(sorted(file.stem for file in folder.glob("[a-z]*.py")))

    def register(self, name: str, settings: type[Any]) -> Callable[[Built], Built]:
        """A decorator for a class or function that makes the thing from its settings.

        settings: a class that `name` shall belong to alone. Raises InputError for a name or settings already taken, and
        for a reserved name.
        """
        if name in self.reserved:
            raise InputError(f"no {self.kind} can be called '{name}', which the metrics call something else")

        def registered(build: Built) -> Built:
            known = self._entries.get(name)
            if known is None and name in self.own_names() and not build.__module__.startswith(f"{self._package}."):
                raise InputError(f"{self.kind} '{name}' is registered already: it is one of this package")
            if known is not None and known.settings.__qualname__ != settings.__qualname__:
                raise InputError(f"{self.kind} '{name}' is registered already, with {known.settings.__qualname__}")
            owner = vars(settings).get("registered_name", name)
            if owner != name:
                raise InputError(f"{settings.__qualname__} is the settings of {self.kind} '{owner}', not of '{name}'")
            settings.registered_name = name
            self._entries[name] = Entry(name, settings, build)
            return build

        return registered

    def origin(self, name: str) -> str:
        """Where a name comes from: this package, the package of an entry point, or the running program."""
        if name in self.own_names():
            return "sparsae"
        point = self._points().get(name)
        return "this program" if point is None else point.dist.name if point.dist else point.value

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name. Raises InputError where there is none, or where its file does not give it."""
        if name not in self._entries:
            self._load(name)
        return self._entries[name]

    def _load(self, name: str) -> None:
        if name in self.own_names():
            import_module(f"{self._package}.{name}")
            return
        points = self._points()
        if name not in points:
            raise InputError(f"no {self.kind} '{name}': use one of {', '.join(self.names())}")
        where = f"the entry point {name} = {points[name].value}"
        try:
            points[name].load()
        except Exception as error:  # whatever somebody else's module does at its import
            raise InputError(f"{self.kind} '{name}': {where} cannot be loaded: {error}") from error
        if name not in self._entries:
            raise InputError(f"{self.kind} '{name}': {where} registers no {self.kind} of that name")

    def _points(self) -> dict[str, metadata.EntryPoint]:
        if self._known_points is None:  # reading them takes as long as the rest of a quick command
            own = set(self.own_names())
            points = metadata.entry_points(group=self._package)
            self._known_points = {point.name: point for point in points if point.name not in own}
        return self._known_points


def import_files() -> None:
    """Import the Python files that $SPARSAE_IMPORT names, for rules and terms that no package has yet.

    Raises InputError for one that cannot be imported.
    """
    for name in filter(None, os.environ.get(IMPORT, "").split(os.pathsep)):
        path = Path(name).expanduser().resolve()
        if any(getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values())):
            continue
        spec = spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise InputError(f"{IMPORT}: {name} is no Python file")
        module = sys.modules[path.stem] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever somebody else's file does at its import
            raise InputError(f"{IMPORT}: {name} cannot be imported: {type(error).__name__}: {error}") from error


RULES = Registry("rule", "sparsae.rules")
# A candidate's row in the metrics has its terms beside these.
TERMS = Registry(
    "term", "sparsae.terms", frozenset({"proposer", "swaps", "score", "rejected", "validation_cross_entropy"})
)
