"""Names under which things are found: in this package, in installed ones, and in the running program.

A topology rule, a term of a score or a family of models is one file that registers what it holds under its own name.
The registry knows names without importing anything: they are the names of a package's files, and those of entry points.
A file is imported when what it holds is first wanted, so that a command which does not want it stays quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from typing import Any, Generic, TypeVar

from sparsae.errors import InputError

IMPORT = "SPARSAE_IMPORT"  # names files, separated as in PATH
_PROGRAM = "this program"

Built = TypeVar("Built", bound=Callable[..., Any])
Thing = TypeVar("Thing")


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


class Names(Generic[Thing]):
    """Things of one kind ("rule"): of the modules of `package`, of entry points of this group, and of the program."""

    def __init__(self, kind: str, package: str, reserved: frozenset[str] = frozenset(), reason: str = "") -> None:
        """reserved: names that none may have, and the reason: "which ..."."""
        self.kind, self._package, self.reserved, self._reason = kind, package, reserved, reason
        self._entries: dict[str, Thing] = {}
        self._own: tuple[str, ...] | None = None
        self._known_points: dict[str, list[metadata.EntryPoint]] | None = None

    def names(self) -> tuple[str, ...]:
        """Every known name, sorted; imports nothing of what they stand for."""
        return tuple(sorted({*self.own_names(), *self._points(), *self._entries} - self.reserved))

    def own_names(self) -> tuple[str, ...]:
        """Names of those that this package itself has."""
        if self._own is None:
            folder = Path(__file__).parent / self._package.partition(".")[2]
            self._own = tuple(sorted(file.stem for file in folder.glob("[a-z]*.py")))
        return self._own

    def loaded(self) -> tuple[Thing, ...]:
        """Those that this package has, and what the program has loaded or registered besides; imports nothing else."""
        own = {name: self[name] for name in self.own_names()}
        return tuple(thing for _, thing in sorted({**self._entries, **own}.items()))

    def origin(self, name: str) -> str:
        """Where a name comes from: this package, the package of an entry point, or the running program."""
        if name in self.own_names():
            return "sparsae"
        return " and ".join(map(_package_of, self._points().get(name, []))) or _PROGRAM

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Thing:
        """What has this name. Raises InputError where there is none, or where its file does not give it."""
        if name in self.own_names():
            if name not in self._entries:
                import_module(f"{self._package}.{name}")
            return self._entries[name]
        points = self._points().get(name, [])
        if len(points) > 1:  # whichever of their modules has been imported for something else
            packages = " and ".join(f"{_package_of(point)} ({point.value})" for point in points)
            raise InputError(f"{self.kind} '{name}' is an entry point of {packages}: uninstall all but one")
        if name not in self._entries:
            self._require_free(name)
            self._load(name, points)
        return self._entries[name]

    def _load(self, name: str, points: list[metadata.EntryPoint]) -> None:
        if not points:
            known = f"use one of {', '.join(self.names())}, or name its file by {IMPORT}"
            raise InputError(f"no {self.kind} '{name}': {known}")
        where = f"the entry point {name} = {points[0].value}"
        try:
            points[0].load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever somebody else's module does at its import, sys.exit() included
            self._entries.pop(name, None)  # what a module had registered before it failed cannot be used either
            raise InputError(f"{self.kind} '{name}': {where} cannot be loaded: {_told(error)}") from error
        if name not in self._entries:
            raise InputError(f"{self.kind} '{name}': {where} registers no {self.kind} of that name")

    def _points(self) -> dict[str, list[metadata.EntryPoint]]:
        """Entry points by name; more than one where packages disagree."""
        if self._known_points is None:  # reading them takes as long as the rest of a quick command
            own, known = set(self.own_names()), dict[str, list[metadata.EntryPoint]]()
            for point in metadata.entry_points(group=self._package):
                if point.name not in own:
                    known.setdefault(point.name, []).append(point)
            self._known_points = known
        return self._known_points

    def _require_free(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise InputError(f"a {self.kind} needs a name, not {name!r}")
        if name in self.reserved:
            raise InputError(f"no {self.kind} can be called '{name}', {self._reason}")

    def _known(self, name: str) -> Thing | None:
        """What has been registered under a name; one of this package is imported to tell."""
        if name in self.own_names():
            import_module(f"{self._package}.{name}")  # nothing happens where it is this module that registers it now
        return self._entries.get(name)


class Registry(Names[Entry]):
    """Things that are made from settings of their own, by name."""

    def origin(self, name: str) -> str:
        """Where a name comes from: this package, the package of an entry point, or the file that registered it."""
        found = super().origin(name)
        module = sys.modules.get(self[name].settings.__module__) if found == _PROGRAM else None
        return Path(module.__file__).name if module is not None and module.__file__ else found

    def register(self, name: str, settings: type[Any]) -> Callable[[Built], Built]:
        """A decorator for a class or function that makes the thing from its settings.

        settings: a class that `name` shall belong to alone. Raises InputError for a name or settings already taken, for
        a reserved name, and for what is no class of settings.
        """
        self._require_free(name)
        self._require_settings(name, settings)

        def registered(build: Built) -> Built:
            known = self._entries.get(name)
            home = getattr(build, "__module__", "")
            if known is None and name in self.own_names() and not home.startswith(f"{self._package}."):
                raise InputError(f"{self.kind} '{name}' is registered already: it is one of this package")
            if known is not None and _place(known.settings) != _place(settings):  # a module may be loaded anew
                raise InputError(
                    f"{self.kind} '{name}' is registered already, with {_place(known.settings)}; "
                    f"{_place(settings)} wants another name"
                )
            owner = vars(settings).get("registered_name", name)
            if owner != name:
                raise InputError(f"{settings.__qualname__} is the settings of {self.kind} '{owner}', not of '{name}'")
            settings.registered_name = name
            is_own = home.startswith(f"{self._package}.")
            self._entries[name] = Entry(name, settings, build if is_own else self._telling(name, build))
            return build

        return registered

    def _telling(self, name: str, build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same, of somebody else, with what goes wrong in it as an InputError that says where in its file."""

        def make(settings: Any) -> Any:
            try:
                return build(settings)
            except InputError:
                raise
            except Exception as error:
                file = getattr(sys.modules.get(build.__module__), "__file__", None)
                lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
                place = f"{file}:{lines[-1]}" if lines else build.__module__
                raise InputError(f"{self.kind} '{name}' cannot be made: {place}: {_told(error)}") from error

        return make

    def _require_settings(self, name: str, settings: object) -> None:
        base = f"sparsae.config.rules.{self.kind.title()}Config"  # by its name: pydantic takes long to import
        bases = settings.__mro__[1:] if isinstance(settings, type) else ()
        if base not in map(_place, bases):
            short = base.rpartition(".")[2]
            raise InputError(
                f"the settings of {self.kind} '{name}' must be a class of their own that inherits {short}, "
                f"not {_place(settings) if isinstance(settings, type) else repr(settings)}"
            )


def _place(settings: type[Any]) -> str:
    return f"{settings.__module__}.{settings.__qualname__}"


def _package_of(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _told(error: BaseException) -> str:
    """An error of somebody else's module in one line."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, InputError | ImportError) else f"{type(error).__name__}: {text}"


def import_files() -> None:
    """Import the Python files that $SPARSAE_IMPORT names, for rules, terms, families, ... of no package.

    Raises InputError for one that cannot be imported.
    """
    for name in filter(None, os.environ.get(IMPORT, "").split(os.pathsep)):
        path = Path(name).expanduser().resolve()
        if any(getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values())):
            continue
        if path.stem in sys.modules or path.stem in sys.stdlib_module_names:
            raise InputError(f"{IMPORT}: {name}: there is another module '{path.stem}'; give the file another name")
        spec = spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise InputError(f"{IMPORT}: {name} is no Python file")
        module = sys.modules[path.stem] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever somebody else's file does at its import, sys.exit() included
            del sys.modules[path.stem]
            raise InputError(f"{IMPORT}: {name} cannot be imported: {_told(error)}") from error


# The methods that ship with the package, each a file.
METHODS = frozenset(file.stem for file in (Path(__file__).parent / "config" / "methods").glob("*.yaml"))
# Settings, plans and runs of an earlier version have underscores in them.
_WITH_UNDERSCORES = {name.replace("-", "_"): name for name in METHODS if "-" in name}


def method_named(name: str) -> str:
    """A method's name with hyphens, where it is given with underscores."""
    return _WITH_UNDERSCORES.get(name, name)


# Every rule is a method too, so none may be called like a method that ships with the package.
RULES = Registry("rule", "sparsae.rules", METHODS.union(_WITH_UNDERSCORES), "which is the name of a method")
# A candidate's row in the metrics has its terms beside these.
TERMS = Registry(
    "term",
    "sparsae.terms",
    frozenset({"proposer", "swaps", "score", "rejected", "validation_cross_entropy"}),
    "which the metrics call something else",
)
