"""Held-out batches out of a data set, on which candidate topologies are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from sparsae.config.rules import MicroBatchConfig
from sparsae.core.randomness import derive_seed, generator
from sparsae.errors import InputError

# A list of samples as the batch that a model takes.
Collate = Callable[[list[Any]], Any]


class HeldOutBatches:
    """`at(step)`: the batch of the update at a step, the same for all candidates; a function of seed and step."""

    def __init__(self, samples: Any, collate: Collate, config: MicroBatchConfig, seed: int) -> None:
        """samples: a data set with `len` and `[]`. Raises InputError for one without, and for an empty one."""
        if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise InputError(
                f"held_out: must be a data set with a length and samples by number, such as a list, not "
                f"{type(samples).__name__}"
            )
        if not len(samples):
            raise InputError("held_out: is empty; give samples that training does not see")
        self._samples, self._collate, self._config, self._seed = samples, collate, config, seed
        # What draws samples may augment them: every candidate gets the same tensors, on every rank.
        self._drawn = lru_cache(maxsize=config.fixed or 1)(self._draw)

    def at(self, step: int) -> Any:
        """The batch, as `collate` made it."""
        if not self._config.fixed:
            return self._drawn(step)
        rng = generator(self._seed, "micro-batch pool", step)
        return self._drawn(int(torch.randint(self._config.fixed, (), generator=rng, device="cpu")))

    def _draw(self, index: int) -> Any:
        rng = generator(self._seed, "micro-batch", self._config.mode, index)
        order = torch.randperm(len(self._samples), generator=rng, device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self._seed, "held-out samples", self._config.mode, index))
            return self._collate([self._samples[i] for i in order[: self._config.sequences].tolist()])
