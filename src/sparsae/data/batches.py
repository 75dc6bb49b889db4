"""Windows of tokens, each batch a pure function of (seed, step, rank): to resume is to ask for the next step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from sparsae.core.randomness import generator
from sparsae.data.mixture import Mixture, turn_of
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
    Of a mixture, each part has epochs of its own, and the turns that its share gives it.
    Raises InputError where `tokens` does not hold one window, and where a batch would repeat a text over and over.
    """

    def __init__(
        self, tokens: TokenSequence | Mixture, context: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is not one of {ranks}")
        self._mixture = Mixture.of(tokens)
        self._counts = [window_count(part, context) for part in self._mixture.parts]
        self.windows = sum(self._counts)
        if (whole := batch_size * ranks) > (most := max(_FEW_WINDOWS, 16 * self.windows)):
            raise InputError(
                f"training.batch_size {whole}: the text has {self.windows:,} sequences of context {context}: "
                f"give at most {most:,}"
            )
        self._context, self._batch_size = context, batch_size
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._orders: list[dict[int, npt.NDArray[np.int64]]] = [{} for _ in self._counts]

    def at(self, step: int) -> torch.Tensor:
        """The batch of optimizer or accumulation step `step` >= 0: int64 (batch_size, context + 1)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        first = (step * self._ranks + self._rank) * self._batch_size
        return torch.from_numpy(np.stack([self._window(place) for place in range(first, first + self._batch_size)]))

    def _window(self, place: int) -> npt.NDArray[np.int64]:
        part, turns = turn_of(self._mixture.shares, place)
        epoch, index = divmod(turns, self._counts[part])
        return _read(self._mixture.parts[part], self._context, int(self._order(part, epoch)[index]))

    def _order(self, part: int, epoch: int) -> npt.NDArray[np.int64]:
        orders = self._orders[part]
        if epoch not in orders:
            while len(orders) > 1:  # A batch may reach into the next epoch: two orders are kept.
                del orders[next(iter(orders))]
            purpose = (epoch, part) if part else (epoch,)  # the first part reads what it reads alone
            rng = generator(self._seed, "batches", *purpose)
            orders[epoch] = torch.randperm(self._counts[part], generator=rng, device="cpu").numpy()
        return orders[epoch]


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
    return torch.from_numpy(np.stack([_read(tokens, context, window) for window in windows]))


def _read(tokens: TokenSequence, context: int, window: int) -> npt.NDArray[np.int64]:
    return np.asarray(tokens[window * context : (window + 1) * context + 1], dtype=np.int64)
