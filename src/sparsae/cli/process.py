"""What a command's process does about its surroundings: streams, signals, and what libraries say."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from sparsae.train.stopping import STOP_SIGNALS


def open_closed_streams() -> None:
    """Where a stream was closed (`>&-`), nothing is read and whatever is written is lost.

    Its number would be that of the next file that is opened, to which libraries would then write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While inside, every signal to stop that nobody else listens to is a Ctrl-C: what is half made is removed.

    A second one ends at once. Only the main thread may handle signals; elsewhere they stay as they are.
    """
    default = [number for number in STOP_SIGNALS if _is_default(number)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for own in default:
            signal.signal(own, signal.SIG_DFL)
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):
        for number in default:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number in default:
                signal.signal(number, signal.SIG_DFL)


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
