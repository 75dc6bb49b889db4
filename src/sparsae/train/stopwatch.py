"""Seconds by part of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """`seconds` by part, each second in one of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.seconds.values())

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the enclosed time as `part`, but for what is counted inside it as another part."""
        started, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[part] = self.seconds.get(part, 0.0) + spent - self._inner
            self._inner = outer + spent

    def state_dict(self) -> dict[str, float]:
        """For checkpoints."""
        return dict(self.seconds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """From `state_dict`."""
        self.seconds = dict(state)
