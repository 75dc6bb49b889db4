"""One process at a time works in a directory: a lock that the system releases when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsae.errors import InputError, TakenError

LOCK = ".lock"


@contextmanager
def locked(directory: Path, what: str, patience: float = 0.0) -> Iterator[int]:
    """Hold the directory's lock, waiting for it so many seconds; gives the descriptor that holds it.

    Raises InputError where the directory cannot be written, TakenError where another process keeps the lock; `what`
    says what that process works on.
    """
    until = time.monotonic() + patience
    while (lock := _attempt(directory)) is None:
        if time.monotonic() >= until:
            raise TakenError(
                f"{directory}: another process works on {what}{_holder(directory)}: wait for it, or stop it"
            )
        time.sleep(0.2)
    try:
        with suppress(OSError):  # a full disk: only the message to others is poorer
            os.truncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


def is_locked(directory: Path) -> bool:
    """Whether a process works in a directory now; writes nothing."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(lock)


def launched_ranks() -> int:
    """As how many ranks a launcher (torchrun) started this program; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "1").strip()
    return int(count) if count.isdecimal() and int(count) > 1 else 1


def is_first_rank() -> bool:
    """Whether this is the process, of those that a launcher started, that writes for all."""
    return launched_ranks() == 1 or os.environ.get("RANK", "0").strip() == "0"


def refuse_ranks(what: str) -> None:
    """InputError in a process that a launcher started as one of several, for `what` is not done by several."""
    if (count := launched_ranks()) > 1:
        raise InputError(
            f"WORLD_SIZE is {count}: several ranks train one run together (sparsae train), and {what} is the work of "
            "one process: start it without torchrun"
        )


def _attempt(directory: Path) -> int | None:
    path = directory / LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}; choose another directory") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    except (BlockingIOError, FileNotFoundError):  # somebody's, or removed with the directory that it was in
        pass
    except OSError as error:
        os.close(lock)
        raise InputError(f"{directory}: cannot be locked: {error.strerror}; choose another directory") from None
    os.close(lock)
    return None


def _holder(directory: Path) -> str:
    try:
        text = (directory / LOCK).read_text("utf-8", errors="replace")[:200].strip()
    except OSError:
        return ""
    return f" ({text})" if text else ""
