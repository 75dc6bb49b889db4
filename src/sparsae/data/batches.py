"""Windows of tokens, each batch a pure function of (seed, step, rank): to resume is to ask for the next step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from sparsae.core.randomness import generator
from sparsae.data.shards import TokenSequence
from sparsae.errors import InputError

_FEW_WINDOWS = 4096  # a batch of so many may repeat the shortest text


def window_count(tokens: TokenSequence, context: int) -> int:
    """Windows of `context` + 1 tokens at a stride of `context`; raises InputError where there is none."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise InputError(
            f"{len(tokens)} tokens are fewer than one window of model.context + 1 = {context + 1}; "
            "give more text (data.source, data.validation_share) or set a shorter model.context"
        )
    return count


class Batches:
    """Random access to the batches of an endless run over `tokens`.

    An epoch visits every window of `context` + 1 tokens once, over all ranks together, in an order of its own drawn
    from (seed, epoch). One rank with batches of R x B sequences reads at each step what R ranks with B read.
    Raises InputError where `tokens` does not hold one window, and where a batch would repeat a text over and over.
    """

    def __init__(
        self, tokens: TokenSequence, context: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is not one of {ranks}")
        self.windows = window_count(tokens, context)
        if batch_size > (most := max(_FEW_WINDOWS, 16 * self.windows)):
            raise InputError(
                f"training.batch_size {batch_size}: the text has {self.windows:,} sequences of context {context}: "
                f"give at most {most:,}"
            )
        self._tokens, self._context, self._batch_size = tokens, context, batch_size
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def at(self, step: int) -> torch.Tensor:
        """The batch of optimizer or accumulation step `step` >= 0: int64 (batch_size, context + 1)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        first = (step * self._ranks + self._rank) * self._batch_size
        places = (divmod(first + i, self.windows) for i in range(self._batch_size))
        return _stack(self._tokens, self._context, [int(self._order(epoch)[place]) for epoch, place in places])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # A batch may reach into the next epoch: two orders are kept.
                del self._orders[next(iter(self._orders))]
            shuffled = torch.randperm(self.windows, generator=generator(self._seed, "batches", epoch), device="cpu")
            self._orders[epoch] = shuffled.numpy()
        return self._orders[epoch]


def evenly_spaced(tokens: TokenSequence, context: int, count: int) -> torch.Tensor:
    """`count` windows (all, if there are fewer) spread evenly over `tokens`: int64 (n, context + 1).

    Raises InputError where `tokens` does not hold one window.
    """
    return _stack(tokens, context, _spread(np.arange(window_count(tokens, context)), count))


def left_over(tokens: TokenSequence, context: int, read: int, count: int) -> torch.Tensor:
    """`count` windows (all, if there are fewer) spread evenly over those that `read` evenly spaced ones leave.

    int64 (n, context + 1), without a row where none is left. Raises InputError as `evenly_spaced`.
    """
    windows = np.arange(window_count(tokens, context))
    chosen = _spread(np.setdiff1d(windows, _spread(windows, read)), count)
    return (
        _stack(tokens, context, chosen)
        if len(chosen)
        else torch.empty((0, context + 1), dtype=torch.int64, device="cpu")
    )


def _spread(windows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    places = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    return windows[places]


def _stack(tokens: TokenSequence, context: int, windows: Iterable[int]) -> torch.Tensor:
    parts = [np.asarray(tokens[w * context : (w + 1) * context + 1], dtype=np.int64) for w in windows]
    return torch.from_numpy(np.stack(parts))
