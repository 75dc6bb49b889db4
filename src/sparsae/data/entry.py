"""Directories of the cache in the making: held by their maker, named when complete, removed if abandoned."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_YOUNG, _ABANDONED = 60.0, 24 * 3600.0  # seconds


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
    """Remove what preparations that were killed have left behind."""
    for path in root.glob("unfinished-*"):
        if _is_abandoned(path):
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
