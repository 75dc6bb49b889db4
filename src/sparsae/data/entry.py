"""Directories of the cache: held by their maker, named when complete, removed if abandoned, whole or made anew.

Each bears the hash of everything that its content depends on, and its manifest has a digest of every other file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors import SafetensorError

from sparsae.data.shards import digest
from sparsae.errors import InputError
from sparsae.files import expanded, read_sealed, write_sealed

MANIFEST = "manifest.json"
_NAME = re.compile("[0-9a-f]{24}")
_UNFINISHED = re.compile(rf"unfinished-{_NAME.pattern}-(\d+-)?[0-9a-f]{{8}}(-damaged)?")
_YOUNG, _ABANDONED = 60.0, 24 * 3600.0  # seconds


def cache_root(cache: str | None) -> Path:
    """`cache`, else $SPARSAE_CACHE, else ~/.cache/sparsae. Raises InputError for what can be no path."""
    path = expanded(cache or os.environ.get("SPARSAE_CACHE") or "~/.cache/sparsae")
    if "\0" in path:
        raise InputError(f"data.cache: {path!r} is no path; set data.cache or SPARSAE_CACHE to a directory")
    return Path(path)


def entry_of(cache: str | None, made_from: Mapping[str, Any]) -> Path:
    """Where what is made from this (JSON) lies in the cache, or would lie."""
    return cache_root(cache) / sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def make_entry(directory: Path, write: Callable[[Path], None], is_sound: Callable[[Path], bool]) -> None:
    """Let `write` fill a directory, which then becomes this one. Raises InputError where it cannot be written."""
    root = directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root)
        unfinished = directory.with_name(f"unfinished-{directory.name}-{os.getpid()}-{token_hex(4)}")
        unfinished.mkdir()
        held = hold(unfinished)
        try:
            write(unfinished)
            publish(unfinished, directory, is_sound)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.close(held)
    except (OSError, SafetensorError) as error:
        where, why = (getattr(error, name, None) for name in ("filename", "strerror"))
        raise InputError(
            f"{where or root}: prepared data cannot be written: {why or error}; "
            "set data.cache or SPARSAE_CACHE to a directory that can"
        ) from None


def seal(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with a digest of every file that the directory has."""
    files = {
        path.relative_to(directory).as_posix(): digest(path) for path in sorted(directory.rglob("*")) if path.is_file()
    }
    write_sealed(directory / MANIFEST, {**manifest, "files": files})


def read_whole(directory: Path) -> dict[str, Any]:
    """The manifest; raises OSError or InputError where files are not what was written."""
    manifest = read_sealed(directory / MANIFEST)
    for name, expected in manifest["files"].items():
        if digest(directory / name) != expected:
            raise InputError(f"{directory / name}: damaged")
    return manifest


def is_whole(directory: Path) -> bool:
    """Whether there is an entry, and its files are what was written."""
    try:
        read_whole(directory)
    except (OSError, InputError, KeyError, AttributeError):
        return False
    return True


@dataclass(frozen=True)
class Kept:
    """What lies in the cache: its bytes, when it was made (seconds since 1970), and of what, unless it is damaged."""

    path: Path
    size: int
    made: float
    texts: tuple[str, ...] = ()
    tokens: int | None = None


def kept(root: Path) -> list[Kept]:
    """Every entry of a cache, newest first; other directories are none of its own, and are left alone."""
    found = [_look(path) for path in root.glob("*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda one: (-one.made, one.path.name))


def remove_entry(one: Kept) -> None:
    """Remove an entry whole: no reader ever sees half of it. Raises InputError where it cannot be."""
    try:
        gone = one.path.rename(one.path.with_name(f"unfinished-{one.path.name}-{token_hex(4)}"))
        shutil.rmtree(gone)
    except OSError as error:
        raise InputError(f"{one.path}: cannot be removed: {error.strerror}") from None


def _look(path: Path) -> Kept:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    made = (path / MANIFEST).stat().st_mtime
    try:
        manifest = read_sealed(path / MANIFEST)
        whole = manifest["made_from"]
        texts = tuple(str(each["source"]["source"]) for each in whole.get("sources", [whole]))
        splits = manifest.get("splits", {}).values()
        tokens = sum(int(split["tokens"]) for split in splits) if splits else None
    except (OSError, InputError, KeyError, TypeError, ValueError, AttributeError):
        return Kept(path, size, made)
    return Kept(path, size, made, texts, tokens)


def publish(unfinished: Path, directory: Path, is_sound: Callable[[Path], bool]) -> None:
    """Give a complete entry its name; what another process has put there in the meantime stays if it is sound."""
    try:
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        if not is_sound(directory):
            # Renamed away first, so that no reader ever sees an entry half removed.
            damaged = unfinished.with_name(f"{unfinished.name}-damaged")
            directory.rename(damaged)
            unfinished.rename(directory)
            shutil.rmtree(damaged, ignore_errors=True)


def remove_abandoned(root: Path) -> None:
    """Remove what preparations that were killed have left behind; what has another name is nobody's of theirs."""
    for path in root.glob("unfinished-*"):
        if _UNFINISHED.fullmatch(path.name) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def hold(directory: Path) -> int:
    """Lock a directory for as long as the descriptor is open, or this process lives."""
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # file systems without locks: age decides there
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _is_abandoned(unfinished: Path) -> bool:
    """Whether nobody works in an entry any more. A young one may be about to be locked."""
    try:
        age = time.time() - unfinished.stat().st_mtime
        handle = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # published or removed in the meantime
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return age > _YOUNG
    except BlockingIOError:
        return False
    except OSError:
        return age > _ABANDONED
    finally:
        os.close(handle)
