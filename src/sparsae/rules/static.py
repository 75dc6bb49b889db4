"""The topology that was drawn first stays.

With an Erdos-Renyi budget it is the baseline of Liu et al. (2022), The Unreasonable Effectiveness of Random Pruning.
"""

from __future__ import annotations

import torch

from sparsae.config.topology import StaticConfig
from sparsae.rules.base import Candidate, NoState, Observation, Rule


class Static(Rule[NoState]):
    """Never due: the baseline that every dynamic rule has to beat."""

    moves = False

    def __init__(self, config: StaticConfig) -> None:
        self.config = config

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return False

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        return []

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {}
