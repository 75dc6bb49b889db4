"""RigL: growth where the dense gradient is largest (Evci et al., 2020).

    k_l = floor(f_t nnz_l),     f_t = alpha / 2 (1 + cos(pi t / T_end))
    D = ArgTopK(-|theta_l|, k_l)                                        drop: the smallest weights of layer l
    G = ArgTopK(|dL/dTheta_l|_i over i not in theta_l - D, k_l)         grow: the largest gradients

What was dropped (D) is among what may grow. A weight in both D and G was never away: it keeps its value and its
moments, as in the reference code (the paper sets "newly activated" weights to zero, and this one was active). So what
is in D alone goes, and what is in G alone comes, at zero.

The gradient is that of the training batch before the update. In the paper, and in the reference code, an update takes
the place of that batch's optimizer step; here the step is made as well, and weights are compared after it. The
reference code adds noise (deviation 1e-5) to the weights' magnitudes; here equals go to the first.

One layer's dense gradient exists at a time, inside its own backward pass. With gradient accumulation that of the last
micro-batch counts; "sum" takes all, and keeps every layer's dense gradient until the step ends.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsae.config.topology import RiglConfig
from sparsae.core.ranking import smallest
from sparsae.core.schedules import is_periodic
from sparsae.core.topology import Topology
from sparsae.rules.base import Candidate, NoState, Observation, Rule
from sparsae.rules.parts import candidate, cosine_fraction, exchange


class Rigl(Rule[NoState]):
    """Magnitude drop, growth by the dense gradient."""

    needs = frozenset({"dense_gradient"})

    def __init__(self, config: RiglConfig) -> None:
        self.config = config
        self.accumulate = config.accumulate

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return is_periodic(step, steps, self.config.every, self.config.stop)

    def growth(self, topologies: Mapping[str, Topology], state: NoState, progress: float) -> dict[str, int]:
        return {name: int(self.drop_fraction(progress) * topology.count) for name, topology in topologies.items()}

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        drop, grow = {}, {}
        for name, view in observation.layers.items():
            n = int(self.drop_fraction(observation.progress) * view.topology.count)
            drop[name], grow[name] = exchange(view, smallest(view.magnitude, n), n)
        return [candidate(observation, "rigl", drop, grow)]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {"drop_fraction": self.drop_fraction(progress)}

    def drop_fraction(self, progress: float) -> float:
        """f in force."""
        return cosine_fraction(self.config.drop_fraction, progress, self.config.stop)
