"""How a run is asked to stop: by a signal, after which the step in progress ends and is saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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


# Seconds in which a signal that comes again is the same one: `timeout` sends it to the process, and to its group.
_AT_ONCE = 0.2


@dataclass(frozen=True)
class FirstSignal:
    """The signal that asked to stop, and when it came."""

    number: int
    at: float = field(default_factory=time.monotonic)

    def is_repeated_by(self, number: int) -> bool:
        """Whether a signal that comes now is the same one again, Ctrl-C or SIGTERM, from somebody who will not wait."""
        is_polite = number == self.number and number in (signal.SIGINT, signal.SIGTERM)
        return is_polite and time.monotonic() - self.at > _AT_ONCE


class StopRequest:
    """Set by the first stop signal, so that the step in progress ends and is saved.

    The same SIGINT or SIGTERM again ends at once; batch systems follow one signal by another, and SIGXCPU comes every
    second, while a run saves. Several runs may share one.
    """

    def __init__(self, seconds: float | None = None, is_patient: bool = False) -> None:
        """seconds: from now on until it is asked to stop in any case. is_patient: no signal ends it at once."""
        self._first: FirstSignal | None = None
        self._is_patient = is_patient
        self._end = None if seconds is None else time.monotonic() + seconds
        self._listeners, self._handlers = 0, ExitStack()

    @property
    def signal(self) -> int | None:
        """The first signal that came."""
        return None if self._first is None else self._first.number

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self._first is not None or (self._end is not None and time.monotonic() >= self._end)

    def ask(self) -> None:
        """Stop, as if the time were over."""
        self._end = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals while anybody is inside; only the main thread may."""
        if not self._listeners:
            self._handlers.enter_context(handled(self._take))
        self._listeners += 1
        try:
            yield self
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._handlers.close()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = FirstSignal(number)
        elif not self._is_patient and self._first.is_repeated_by(number):
            raise KeyboardInterrupt
