"""The learning rate of each step: a warm-up, a cosine, and a second warm-up where a run got more steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsae.config.schema import TrainingConfig
from sparsae.core.cadence import cosine_with_warmup
from sparsae.runs.manifest import Extension


@dataclass(frozen=True)
class LearningRate:
    """`peak` and `final`, a share of it, over `steps`, of which the share `warmup` rises; steps count from 0."""

    peak: float
    final: float
    warmup: float
    steps: int
    extension: Extension | None = None

    @classmethod
    def of(cls, settings: TrainingConfig, extension: Extension | None = None) -> LearningRate:
        """By the settings of a run; `extension`: the last one of a run that got more steps."""
        return cls(
            settings.learning_rate, settings.final_learning_rate, settings.warmup, settings.steps, extension=extension
        )

    def at(self, step: int) -> float:
        """Of a group whose scale is 1."""
        rate = self.peak * cosine_with_warmup(step, self.steps, self.warmup, self.final)
        if self.extension and step >= self.extension.step:
            rate *= self.extension.factor(step)
        return rate

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give every group its own (`lr_scale` times the rate); returns the rate."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate
