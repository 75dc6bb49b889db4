"""The learning rate of each step: a warm-up, a schedule, and a second warm-up where a run got more steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsae.config.training import DECAY, TrainingConfig
from sparsae.core.cadence import rate_factor
from sparsae.runs.manifest import Extension


@dataclass(frozen=True)
class LearningRate:
    """The schedule that settings ask for, and the last extension of a run that got more steps."""

    settings: TrainingConfig
    extension: Extension | None = None

    def at(self, step: int) -> float:
        """Of a group whose scale is 1, at a step counted from 0."""
        own = self.settings
        decay = DECAY if own.decay is None else own.decay
        rate = own.learning_rate * rate_factor(
            step, own.steps, own.warmup, own.final_learning_rate, own.schedule, decay
        )
        if self.extension and step >= self.extension.step:
            rate *= self.extension.factor(step)
        return rate

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give every group its own (`lr_scale` times the rate); returns the rate."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate
