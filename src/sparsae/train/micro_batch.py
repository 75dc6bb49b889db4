"""The held-out sequences on which candidates are scored, on the device before they are wanted.

They come from a text that neither validation nor the test reads (train/held_out.py): a topology that was chosen on a
text should not be judged by it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsae.config.rules import MicroBatchConfig
from sparsae.core.host import on_device
from sparsae.core.randomness import generator
from sparsae.data.shards import TokenSequence


class MicroBatches:
    """`at(step)`: (sequences, context + 1) tokens; a pure function of seed and step."""

    def __init__(
        self, tokens: TokenSequence, context: int, config: MicroBatchConfig, seed: int, device: torch.device
    ) -> None:
        self._tokens, self._context, self._config = tokens, context, config
        self._seed, self._device = seed, device
        self._pool = [self._draw(index) for index in range(config.fixed)]
        self._latest: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Tensor:
        """The micro-batch of the update at `step`; the same one for every candidate."""
        if self._pool:
            pick = torch.randint(
                len(self._pool), (), generator=generator(self._seed, "micro-batch pool", step), device="cpu"
            )
            return self._pool[int(pick)]
        if self._latest is None or self._latest[0] != step:
            self.prefetch(step)
        assert self._latest is not None
        return self._latest[1]

    def prefetch(self, step: int) -> None:
        """Start the copy of a resampled micro-batch to the device."""
        if not self._pool:
            self._latest = (step, self._draw(step))

    def _draw(self, index: int) -> Tensor:
        rng = generator(self._seed, "micro-batch", self._config.mode, index)
        last = len(self._tokens) - self._context - 1
        starts = torch.randint(last + 1, (self._config.sequences,), generator=rng, device="cpu").tolist()
        rows = np.stack([self._tokens[start : start + self._context + 1] for start in starts])
        return on_device(torch.from_numpy(rows.astype(np.int64)), self._device)
