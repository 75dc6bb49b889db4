"""All that a run spends: operations, seconds, bytes of its model's state, updates of its topology, skipped steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsae.core.accounting import FlopCounter
from sparsae.nn.linear import sparse_layers
from sparsae.search.teacher import Teacher
from sparsae.search.updates import Update
from sparsae.train.costs import RunCosts
from sparsae.train.memory import state_bytes
from sparsae.train.stopwatch import Stopwatch


class Account:
    """Sums from the first step of a run on."""

    def __init__(
        self, costs: RunCosts, tokens_per_step: int, study_tokens: int, peak_flops: float | None = None
    ) -> None:
        """study_tokens: what a candidate is studied on, the validation text. peak_flops: a second, of all devices."""
        self.costs, self.tokens_per_step, self._study_tokens = costs, tokens_per_step, study_tokens
        self.peak_flops = peak_flops
        self.flops = FlopCounter()
        self.watch = Stopwatch()
        self.state_bytes: dict[str, int] = {}
        self.updates = self.accepted = 0
        self.skipped = self.skipped_in_a_row = 0

    def tokens(self, steps: int) -> int:
        """Training tokens of so many steps."""
        return steps * self.tokens_per_step

    def utilization(self, flops_per_second: float | None) -> float | None:
        """Which share of the peak counted operations a second are; None where one of both is not known."""
        return None if self.peak_flops is None or flops_per_second is None else flops_per_second / self.peak_flops

    def step(self, taught_tokens: int, teacher_nnz: int) -> None:
        """One optimizer step, in which a teacher of so many weights read so many tokens."""
        self.costs.count_step(self.flops, self.tokens_per_step, taught_tokens, teacher_nnz)

    def skip(self) -> None:
        """One step that changes no weight."""
        self.skipped += 1
        self.skipped_in_a_row += 1

    def update(self, update: Update, nnz: Mapping[str, int]) -> None:
        """One topology update, which left the layers so many active weights."""
        self.updates += 1
        self.accepted += update.accepted
        self.costs.count_update(self.flops, update.cost)
        self.costs.count_study(self.flops, update.cost, self._study_tokens)
        self.costs.follow(nnz)

    def measure_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, teacher: Teacher | None, window: int = 0
    ) -> None:
        """While gradients are alive; the largest that was seen counts, since a union teacher grows.

        window: bytes of gradients that are averaged for an update.
        """
        now = state_bytes(sparse_layers(model), optimizer, teacher.layers if teacher else None)
        now |= {"window": window} if window else {}
        if sum(now.values()) >= sum(self.state_bytes.values()):
            self.state_bytes = now

    def state_dict(self) -> dict[str, Any]:
        """JSON values, for checkpoints."""
        return {
            "flops": self.flops.to_dict(),
            "seconds": self.watch.state_dict(),
            "state_bytes": dict(self.state_bytes),
            "updates": self.updates,
            "accepted": self.accepted,
            "skipped": [self.skipped, self.skipped_in_a_row],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`."""
        self.flops = FlopCounter.from_dict(state["flops"])
        self.watch.load_state_dict(state["seconds"])
        self.state_bytes = dict(state["state_bytes"])
        self.updates, self.accepted = state["updates"], state["accepted"]
        self.skipped, self.skipped_in_a_row = state.get("skipped", (0, 0))
