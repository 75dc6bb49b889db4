"""How a run is asked to stop: by a signal, after which the step in progress ends and is saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
"""Ctrl-C, a polite kill, a terminal that closes, a batch system's warning, a limit of CPU time that is reached."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stop signals while inside; only the main thread may. A hangup that is ignored (nohup) stays so."""
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


class StopRequest:
    """Set by the first stop signal, so that the step in progress ends and is saved.

    The same SIGINT or SIGTERM again ends at once; batch systems follow one signal by another, and SIGXCPU comes every
    second, while a run saves.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals while inside; only the main thread may."""
        with handled(self._take):
            yield self

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        self.signal = self.signal or number
