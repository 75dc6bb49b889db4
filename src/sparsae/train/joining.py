"""A process that a launcher (torchrun, or a batch system that sets its variables) started as one of several ranks.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

Inside `joined` it is one rank of torch's default process group. A rank that ends by an error leaves one line with the
others, who would only see that a connection broke.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sparsae.core.ranks import ranks
from sparsae.errors import InputError, RankLostError, RanksError
from sparsae.runs.lock import launched_ranks

_PATIENCE = timedelta(hours=2)  # the first rank may tokenize that long while the others wait
_LAST_WORDS = 5.0  # seconds that a rank waits for what another one may have to say
_ENDED = "sparsae/ended"


@contextmanager
def joined() -> Iterator[None]:
    """Train with the other ranks while inside; with none where no launcher says so, or a group exists already.

    Raises InputError where the launcher's variables are incomplete, and RanksError, which names the rank, where another
    one has ended.
    """
    count = launched_ranks()
    if count == 1 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    rank, store = _meet(count)
    try:
        _join(rank, count, store)
        yield
    except Exception as error:
        with _let_speak():
            _say(store, rank, count, error)
        raise
    dist.destroy_process_group()


def _meet(count: int) -> tuple[int, Any]:
    """This rank's number, and the store that all ranks see."""
    needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    if lacking := [name for name in needed if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {count}, but {lacking[0]} is not set: start the ranks by torchrun")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    return rank, store


def _join(rank: int, count: int, store: Any) -> None:
    dist.init_process_group(store=PrefixStore("sparsae", store), rank=rank, world_size=count, timeout=_PATIENCE)
    store.set(f"{_ENDED}/place/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    if not ranks().is_first:
        logging.getLogger("sparsae").setLevel(logging.ERROR)  # the first rank warns for all
    ranks().wait()


@contextmanager
def _let_speak() -> Iterator[None]:
    """Not ended by the SIGTERM that torchrun sends to the others once a rank has failed; SIGKILL follows later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(store: Any, rank: int, count: int, error: Exception) -> None:
    """Leave the error of this rank for the others; raise RanksError where it follows from another's end."""
    own = str(error) if isinstance(error, (InputError, RanksError)) else f"{type(error).__name__}: {error}"
    # Torch has no exception of its own for a connection that breaks in a backward pass.
    is_echo = isinstance(error, RankLostError | dist.DistError) or type(error) is RuntimeError
    said, dead = None, None
    try:
        until = time.monotonic() + (_LAST_WORDS if is_echo else 0.0)
        while not store.check([_ENDED]) and dead is None and time.monotonic() < until:
            time.sleep(0.05)
            dead = _dead(store, count)
        if dead is not None and not store.check([_ENDED]):
            raise RanksError(f"rank {dead} has ended without a word (killed, or out of memory)") from error
        said = json.loads(store.compare_set(_ENDED, "", json.dumps([rank, own])))
    except (dist.DistError, RuntimeError):
        if is_echo:  # without a launcher that keeps the store, it goes with the first rank
            raise RanksError("rank 0, or the launcher of the ranks, has ended before it could say why") from error
    if said is not None and said[0] != rank and said[1] != own:
        raise RanksError(f"rank {said[0]} ended: {said[1]}") from error


def _dead(store: Any, count: int) -> int | None:
    """The first rank of this machine whose process is no more."""
    for rank in range(count):
        if not store.check([f"{_ENDED}/place/{rank}"]):
            continue  # it has not come yet
        host, process = json.loads(store.get(f"{_ENDED}/place/{rank}"))
        if host == socket.gethostname():
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return rank
            except PermissionError:
                continue
    return None
