"""The data of a run as the loop reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsae.config.schema import Config
from sparsae.core.ranks import ranks
from sparsae.data.batches import Batches
from sparsae.data.mixture import Mixture
from sparsae.data.shards import TokenSequence
from sparsae.errors import InputError
from sparsae.rules import build_rule
from sparsae.train.micro_batch import MicroBatches


@dataclass(frozen=True, eq=False)
class TrainData:
    """Batches to train on, rows (N, context + 1) to validate on, and what scores candidates, if anything does."""

    batches: Batches
    validation: Tensor
    micro_batches: MicroBatches | None = None
    test: Tensor | None = None
    """Rows that only the end of a run reads; None or without a row: the held-out text has none left."""

    @classmethod
    def of(
        cls,
        config: Config,
        train: TokenSequence | Mixture,
        validation: Tensor,
        held_out: TokenSequence,
        device: torch.device,
        test: Tensor | None = None,
    ) -> TrainData:
        """held_out: the tokens that micro-batches come from, which lie on `device`.

        Raises InputError where the batch cannot be divided among the ranks.
        """
        here, size = ranks(), config.training.batch_size
        if size % here.count:
            raise InputError(
                f"training.batch_size {size} cannot be divided among {here.count} ranks: give a multiple of that"
            )
        context, micro = config.model.context, build_rule(config.topology, config.rules).micro_batch
        return cls(
            Batches(train, context, size // here.count, config.seed, here.rank, here.count),
            validation,
            MicroBatches(held_out, context, micro, config.seed, device) if micro else None,
            test,
        )

    def prefetch(self, step: int) -> None:
        """An update follows `step`: start the copy of its micro-batch to the device."""
        if self.micro_batches:
            self.micro_batches.prefetch(step)
