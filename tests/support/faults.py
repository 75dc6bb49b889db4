"""What can happen to a run from outside: damage, kills, signals, a failing disk, a second process."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.losses import LossParts
from sparsae.report.data import read_run
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
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        code = 70
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        except (InputError, OSError):
            code = 2
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
