"""Trackers: the numbers of the metrics rows under the same names, in a package that may not be installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsae.errors import InputError
from sparsae.runs.directory import RunDirectory
from sparsae.runs.metrics import read_rows
from sparsae.runs.rows import Row


def package(module: str, extra: str) -> ModuleType:
    """A module of an optional package. Raises InputError, with the extra that brings it, where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"tracking.{extra} needs a package that is not installed: pip install 'sparsae[{extra}]'"
        ) from None


def identity_of(run: Path) -> str:
    """What no other run has, 32 hexadecimal digits: a run that is resumed has it still, and another of its name not."""
    manifest = RunDirectory(run).manifest()
    assert manifest is not None
    return manifest.run


def told_before(run: Path) -> frozenset[tuple[str, int]]:
    """Kind and step of the rows that a run had told when it was stopped, but for the last, of which it is not certain.

    Those after its last checkpoint are measured again, and are the same again.
    """
    file = RunDirectory(run).metrics
    rows = [(row.kind, row.step) for row in read_rows(file, (Row,))] if file.exists() else []
    return frozenset(rows[:-1])


def started(module: str, run: Path, **own: str) -> ModuleType:
    """trackio or W&B, which have the same calls, with the run's settings. Raises InputError where it cannot start.

    own: its arguments beside project, name and config; one of them may be the name.
    """
    tracker, config = package(module, module), RunDirectory(run).config()
    given = {"name": run.name, **own}
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, *_own_errors(tracker))
    try:
        tracker.init(project=config.tracking.project, config=config.model_dump(mode="json"), resume="allow", **given)
    except failures as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"tracking.{module} cannot start: {reason}") from None
    return tracker


def numbers_of(row: Row) -> dict[str, float]:
    """The numbers of a row as "kind/name"; nested ones as "kind/name/inner"."""
    return dict(_numbers(row.to_dict(), row.kind))


def _own_errors(tracker: ModuleType) -> tuple[type[Exception], ...]:
    """The base of W&B's own exceptions; trackio has none."""
    base = getattr(getattr(tracker, "errors", None), "Error", None)
    return (base,) if isinstance(base, type) and issubclass(base, Exception) else ()


def _numbers(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, name)
        elif isinstance(value, int | float) and key not in ("step", "kind"):
            yield name, float(value)
