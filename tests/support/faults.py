"""What can happen to a run from outside: damage, kills, signals, a failing disk, a second process."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch.distributed import TCPStore

from sparsae.errors import InputError, RanksError
from sparsae.evaluate.loading import load_run
from sparsae.losses import LossParts
from sparsae.report.data import read_run
from sparsae.runs import checkpoint
from sparsae.runs.directory import describe
from sparsae.train.objective import Objective
from sparsae.train.run import resume
from tests.support.runs import rows, weights

UNREAD = ("report.html", ".lock")  # nothing of ours reads them


def damage(run: Path, other: Path, rng: random.Random) -> str:
    """Change one file of a run in one way, or put another run's in its place; says what was done."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in UNREAD)
    file = rng.choice(files)
    name = file.relative_to(run)
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "zero", "digit", "gone", "other", "twice"])
    at = rng.randrange(len(content))
    if kind == "gone" and file.name in ("summary.json", "sample.json"):
        kind = "cut"  # a run that lacks them is one that was killed before they were written
    if kind == "gone":
        file.unlink()
    elif kind == "other":
        file.write_bytes((other / name).read_bytes())
    else:
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "zero":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(content) if 48 <= byte < 58] or [at]
            content[rng.choice(digits)] = 48 + rng.randrange(10)
        else:
            content = content + content
        file.write_bytes(bytes(content))
    return f"{kind} {name} at {at}"


def seen(run: Path) -> list[Any]:
    """What every reading command makes of a run: its results, or "refused"."""

    def report() -> Any:
        data = read_run(run)
        return [repr(part) for part in (data.config, data.train, data.validation, data.topologies)], data.sample

    def model() -> Any:
        loaded = load_run(run)
        tokens = torch.tensor([loaded.tokenizer.encode("item 3 of list 4")])
        with torch.no_grad():
            return loaded.model(tokens).logits.sum().item(), loaded.step, loaded.config.model_dump_json()

    results: list[Any] = []
    for use in (lambda: describe(run), report, model):
        try:
            results.append(use())
        except InputError:
            results.append("refused")
    return results


def assert_found_or_without_effect(run: Path, told: str, before: list[Any], end: Path, steps: int) -> None:
    """After damage: each command says what it said before or refuses, and what can be resumed ends the same."""
    for now, then in zip(seen(run), before, strict=True):
        if now != "refused":
            if isinstance(now, dict):
                now, then = ({**known, "run": "", "checkpoint_step": 0} for known in (now, then))
            assert repr(now) == repr(then), told
    try:
        resume(run, quiet=True, steps=steps)
    except InputError:
        pass
    else:
        assert rows(run) == rows(end), told
        assert weights(run) == weights(end), told


def in_child(action: Callable[[], Any], after: float | None = None, number: int = signal.SIGKILL) -> int:
    """Run in a process of its own that gets a signal after so many seconds; its exit code, negative: the signal.

    2: an InputError or an OSError, as on the command line.
    """
    child = os.fork()
    if child == 0:
        in_child_now(action)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_in_a_save(action: Callable[[], Any], count: int, share: float) -> bool:
    """Run in a process that gets SIGKILL inside its so manyth save, at this share of the first save's time, or later.

    Whether it was still in the save.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        whole, made = checkpoint.write_whole, 0

        def writing(*given: Any) -> None:
            nonlocal made
            made += 1
            os.write(write, b"b")
            whole(*given)
            os.write(write, b"e")

        checkpoint.write_whole = writing
        in_child_now(action)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        first = seconds = 0.0
        begun = 0
        while begun < count and (event := pipe.read(1)):
            if event == b"b":
                begun += 1
                first = time.perf_counter()
            elif not seconds:
                seconds = time.perf_counter() - first
        time.sleep(share * (seconds or 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return begun == count and not pipe.read()


def in_child_now(action: Callable[[], Any]) -> NoReturn:
    """The rest of a process that was forked; exits as `in_child` says."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    code = 70
    try:
        torch.set_num_threads(1)
        action()
        code = 0
    except (InputError, OSError):
        code = 2
    finally:
        os._exit(code)


def ranks_in_children(
    action: Callable[[], Any],
    count: int = 2,
    after: float | None = None,
    victims: Collection[int] = (),
    number: int = signal.SIGKILL,
    spoil: Mapping[int, Callable[[], None]] | None = None,
    within: float = 60.0,
    launcher: bool = True,
) -> tuple[list[int], list[str]]:
    """Run as so many ranks in processes of their own, of which `victims` get a signal after so many seconds.

    spoil: called first in the process of a rank. Gives exit codes as on the command line (1: a RanksError), negative: a
    signal; and the error of each rank. launcher: the ranks' store is kept by none of them, as under
    torchrun. Fails where a rank has not ended so many seconds after the first one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if launcher else None
    agent = {"TORCHELASTIC_USE_AGENT_STORE": str(launcher), "TORCHELASTIC_RESTART_COUNT": "0"}
    told = [os.memfd_create(f"rank-{rank}") for rank in range(count)]
    children = [_rank(action, rank, count, port, agent, told[rank], (spoil or {}).get(rank)) for rank in range(count)]
    codes: dict[int, int] = {}
    if after is not None:
        time.sleep(after)
        for rank in victims:
            os.kill(children[rank], number)
    until = math.inf
    while len(codes) < count:
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                until = min(until, time.monotonic() + within)
        if time.monotonic() > until:
            for rank, child in enumerate(children):
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            raise AssertionError(f"only ranks {sorted(codes)} ended within {within:g} s")
        time.sleep(0.01)
    errors = [os.pread(file, 100_000, 0).decode() for file in told]
    for file in told:
        os.close(file)
    del store
    return [codes[rank] for rank in range(count)], errors


def _rank(
    action: Callable[[], Any],
    rank: int,
    count: int,
    port: int,
    agent: dict[str, str],
    told: int,
    spoil: Callable[[], None] | None,
) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **agent}
        torch.set_num_threads(1)
        if spoil is not None:
            spoil()
        action()
        code = 0
    except (InputError, OSError, RanksError) as error:
        code = 1 if isinstance(error, RanksError) else 2
        os.pwrite(told, str(error).encode(), 0)
    except BaseException as error:
        os.pwrite(told, repr(error).encode(), 0)
    finally:
        os._exit(code)


@contextmanager
def not_finite(what: str, steps: Collection[int]) -> Iterator[None]:
    """The loss, the gradient or the teacher of runs inside is NaN in these steps, counted from 1, on this rank."""
    begin, loss, step = Objective.begin_step, Objective._own_loss, 0

    def beginning(self: Objective, done: int) -> None:
        nonlocal step
        step = done + 1
        begin(self, done)

    def spoiled(self: Objective, *given: Any) -> LossParts:
        parts = loss(self, *given)
        if step not in steps:
            return parts
        if what == "gradient":
            parts.total.register_hook(lambda gradient: gradient * math.nan)
            return parts
        if what == "teacher":
            return parts._replace(total=parts.total + math.inf, distillation=parts.distillation + math.inf)
        return parts._replace(total=parts.total * math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "begin_step", beginning)
        patch.setattr(Objective, "_own_loss", spoiled)
        yield


@contextmanager
def failing_disk(call: str, count: int) -> Iterator[Callable[[], bool]]:
    """Calls of `os.NAME` fail from the so manyth on, as on a full disk; gives whether any did."""
    whole, made = getattr(os, call), 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        if made >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing)
        yield lambda: made >= count


def open_files() -> set[str]:
    """The files that this process has open; of Linux alone."""
    folder = Path("/proc/self/fd")
    links = [folder / name for name in (os.listdir(folder) if folder.is_dir() else ())]
    return {os.readlink(link) for link in links if link.is_symlink() and link.is_file()}
