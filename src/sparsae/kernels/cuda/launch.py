"""How kernels are started: with the best of some configurations on a GPU, with the first one in the interpreter.

Configurations differ in nothing that changes the order in which a sum is added up: whichever is fastest today, the
numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton

from sparsae.kernels.availability import interpreted

Meta = Mapping[str, Any]


class Tuned:
    """A kernel with its configurations. The tuner, which asks for a driver, is made at the first launch on a GPU."""

    def __init__(self, kernel: Any, configurations: Sequence[tuple[dict[str, int], int, int]], key: list[str]) -> None:
        """configurations: each (constants, warps, stages). key: arguments that a new choice is made for."""
        self.kernel, self.configurations, self._key = kernel, configurations, key
        self._tuner: Any = None

    def __call__(self, programs: Callable[[Meta], tuple[int]], *arguments: Any, **constants: Any) -> None:
        """programs: how many, by the constants of the configuration."""
        if interpreted():
            chosen = constants | self.configurations[0][0]
            self.kernel[programs(chosen)](*arguments, **chosen)
            return
        if self._tuner is None:
            configurations = [triton.Config(c, num_warps=w, num_stages=s) for c, w, s in self.configurations]
            self._tuner = triton.autotune(configs=configurations, key=self._key)(self.kernel)
        self._tuner[programs](*arguments, **constants)
