"""One-shot magnitude pruning: train dense, drop all but the largest weights once, go on training (Han et al., 2015).

Han et al. set a threshold a layer and may repeat; here the threshold is that which leaves exactly the model's budget,
over the whole model ("global") or in each layer ("local").
"""

from __future__ import annotations

import math

import torch

from sparsae.config.topology import MagnitudeConfig
from sparsae.core.ranking import smallest
from sparsae.rules.base import Candidate, NoState, Observation, Rule
from sparsae.rules.parts import candidate, pruned_counts


class Magnitude(Rule[NoState]):
    """Magnitude drop without growth, once."""

    prunes = True

    def __init__(self, config: MagnitudeConfig) -> None:
        self.config = config

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return step == max(1, math.floor(self.config.at * steps))

    def active_units(self, start: int, end: int, step: int, steps: int) -> int:
        return end if step >= max(1, math.floor(self.config.at * steps)) else start

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        pruned = pruned_counts(observation, 0.0, self.config.scope)
        drop = {
            name: view.topology.indices[smallest(view.magnitude, pruned[name])]
            for name, view in observation.layers.items()
        }
        return [candidate(observation, "magnitude", drop, {})]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {}
