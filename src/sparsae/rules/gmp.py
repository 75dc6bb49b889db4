"""GMP: gradual magnitude pruning (Zhu & Gupta, 2017).

    k_t = k_end + (k_start - k_end) (1 - (t - t_0) / (t_1 - t_0))^3

At t = t_0, t_0 + every, ... and t_1 the smallest |w| go, until k_t units are left; none comes back. "local" is the
paper: each layer follows the schedule, from its first to its last number of units, which the budget gives (the paper's
layers have one sparsity: `sparsity.budget=uniform`). "global" ranks the weights of all layers together; no layer falls
below its k_min. What is pruned is gone from values, optimizer and teacher, and the steps that follow cost less.
"""

from __future__ import annotations

import torch

from sparsae.config.topology import GmpConfig
from sparsae.core.ranking import smallest
from sparsae.core.schedules import Cubic
from sparsae.rules.base import Candidate, NoState, Observation, Rule
from sparsae.rules.parts import candidate, pruned_counts, shrunk


class Gmp(Rule[NoState]):
    """Magnitude drop without growth, by a cubic schedule."""

    prunes = True

    def __init__(self, config: GmpConfig) -> None:
        self.config = config
        self.schedule = Cubic(config.start, config.stop, config.every)

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return self.schedule.due(step, steps)

    def active_units(self, start: int, end: int, step: int, steps: int) -> int:
        return shrunk(start, end, self.schedule.left(step, steps))

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        left = self.schedule.left(observation.step, observation.steps)
        pruned = pruned_counts(observation, left, self.config.scope)
        drop = {
            name: view.topology.indices[smallest(view.magnitude, pruned[name])]
            for name, view in observation.layers.items()
        }
        return [candidate(observation, "gmp", drop, {})]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {}
