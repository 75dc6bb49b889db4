"""What a command's process does about its surroundings: streams, signals, and what libraries say."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from sparsae.runs.lock import launched_ranks
from sparsae.train.stopping import STOP_SIGNALS

_TAKEN: set[int] = set()


def _give_back() -> None:
    with contextlib.suppress(ValueError):
        while _TAKEN:
            signal.signal(next(iter(_TAKEN)), signal.SIG_DFL)
            _TAKEN.pop()


def _hold_back() -> None:
    global _mask
    with _once_more():
        _mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)


def _let_through() -> None:
    with _once_more():
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


@contextlib.contextmanager
def _once_more() -> Iterator[None]:
    """An interrupt, of which nobody would hear around a fork, comes again once that is made."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()


def _let_through_in_child() -> None:
    _give_back()
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


_mask: set[int] = set()
# A pool of processes ends its own by SIGTERM, and these are forks. One that comes before a fork has its signals back
# waits until then: the handler that the fork was born with would take it, and the fork live on.
os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_let_through_in_child)


def open_closed_streams() -> None:
    """Where a stream was closed (`>&-`), nothing is read and whatever is written is lost.

    Its number would be that of the next file that is opened, to which libraries would then write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - as long as the process
            os.set_inheritable(stream.fileno(), True)  # a worker's numbers are these
            setattr(sys, name, stream)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While inside, every signal to stop that nobody else listens to is a Ctrl-C: what is half made is removed.

    A second one ends at once. Only the main thread may handle signals; elsewhere they stay as they are. So do those of
    one of several ranks, which could not answer while it waits for the others.
    """
    default = [number for number in STOP_SIGNALS if _is_default(number) and launched_ranks() == 1]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for own in default:
            signal.signal(own, signal.SIG_DFL)
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):
        for number in default:
            signal.signal(number, interrupt)
            _TAKEN.add(number)
    try:
        yield
    finally:
        _give_back()


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """What libraries say to those who hold a model, and their progress bars beside ours, are nothing for a terminal."""
    hints = logging.getLogger("sparsae.nn.summary")
    before = hints.level
    hints.setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too, read when they are imported
    try:
        yield
    finally:
        hints.setLevel(before)


def _is_default(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_DFL
