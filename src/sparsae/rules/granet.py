"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al., 2021).

At each step of the cubic schedule (Zhu & Gupta, 2017; see gmp.py), from k_start to k_end units:

    prune: the smallest |w| go, until k_t units are left (over the whole model, or "local" in each layer)
    regenerate, in each layer, with k_l = floor(r_t nnz_l) of what is left:
        the k_l smallest |w| go, and the k_l inactive units with the largest |gradient| come, at zero

with r_t = r / 2 (1 + cos(pi t / T)). As in RigL, what has just gone is among what may come, and a weight that does both
keeps its value and moments. Without regeneration it is GMP. The reference code goes on regenerating after the
schedule's end, until the end of the training; the paper does so within it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsae.config.topology import GranetConfig
from sparsae.core.ranking import smallest
from sparsae.core.schedules import Cubic
from sparsae.core.topology import Topology
from sparsae.rules.base import Candidate, NoState, Observation, Rule
from sparsae.rules.parts import candidate, cosine_fraction, exchange, pruned_counts, shrunk


class Granet(Rule[NoState]):
    """Magnitude drop by a cubic schedule, and a magnitude drop with as much growth by the dense gradient."""

    needs = frozenset({"dense_gradient"})
    prunes = True

    def __init__(self, config: GranetConfig) -> None:
        self.config = config
        self.accumulate = config.accumulate
        self.schedule = Cubic(config.start, config.stop, config.every)

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return self.schedule.due(step, steps)

    def active_units(self, start: int, end: int, step: int, steps: int) -> int:
        return shrunk(start, end, self.schedule.left(step, steps))

    def growth(self, topologies: Mapping[str, Topology], state: NoState, progress: float) -> dict[str, int]:
        # Of what is there before pruning: how much each layer loses is not known until the optimizer has stepped.
        return {name: int(self.regeneration(progress) * topology.count) for name, topology in topologies.items()}

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        left = self.schedule.left(observation.step, observation.steps)
        pruned = pruned_counts(observation, left, self.config.scope)
        drop, grow = {}, {}
        for name, view in observation.layers.items():
            n = int(self.regeneration(observation.progress) * (view.topology.count - pruned[name]))
            gone = smallest(view.magnitude, pruned[name] + n)
            if n:
                drop[name], grow[name] = exchange(view, gone, n)
            else:
                drop[name] = view.topology.indices[gone]
        return [candidate(observation, "granet", drop, grow)]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {"drop_fraction": self.regeneration(progress)}

    def regeneration(self, progress: float) -> float:
        """r in force."""
        return cosine_fraction(self.config.regeneration, progress, 1.0)
