"""SET: sparse evolutionary training (Mocanu et al., 2018), on RigL's schedule (Evci et al., 2020).

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    drop: the k_l smallest |w| of layer l
    grow: k_l of its inactive units, uniformly; they start at zero

Mocanu et al. drop the same share of the smallest positive and of the largest negative weights, once an epoch, at a
constant rate; comparisons since Evci et al. use |w| and the schedule above. A unit cannot be dropped and regrown by one
update: what grows was inactive before it.
"""

from __future__ import annotations

import torch

from sparsae.config.topology import SetConfig
from sparsae.core.ranking import smallest
from sparsae.core.schedules import is_periodic
from sparsae.rules.base import Candidate, NoState, Observation, Rule
from sparsae.rules.parts import candidate, cosine_fraction


class Set(Rule[NoState]):
    """Magnitude drop, random growth."""

    def __init__(self, config: SetConfig) -> None:
        self.config = config

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return is_periodic(step, steps, self.config.every, self.config.stop)

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        fraction = self.drop_fraction(observation.progress)
        drop, grow = {}, {}
        for name, view in observation.layers.items():
            topology = view.topology
            n = min(int(fraction * topology.count), topology.units - topology.count)
            drop[name] = topology.indices[smallest(view.magnitude, n)]
            grow[name] = topology.sample_inactive(n, rng)
        return [candidate(observation, "set", drop, grow)]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {"drop_fraction": self.drop_fraction(progress)}

    def drop_fraction(self, progress: float) -> float:
        """f in force."""
        return cosine_fraction(self.config.drop_fraction, progress, self.config.stop)
