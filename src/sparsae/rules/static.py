"""The topology that was drawn first stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsae.config.schema import StaticConfig
from sparsae.rules.base import Candidate, Decision, Observation, Rule, Score


@dataclass(frozen=True)
class StaticState:
    """Nothing to remember."""


class Static(Rule[StaticState]):
    """Never due: the baseline that every dynamic rule has to beat."""

    def __init__(self, config: StaticConfig) -> None:
        self.config = config

    def initial_state(self) -> StaticState:
        return StaticState()

    def due(self, step: int, steps: int) -> bool:
        return False

    def ask(self, observation: Observation, state: StaticState, rng: torch.Generator) -> list[Candidate]:
        return []

    def tell(
        self,
        candidates: Sequence[Candidate],
        scores: Sequence[Score | None],
        current: Score | None,
        state: StaticState,
        progress: float,
    ) -> tuple[Decision, StaticState]:
        return Decision(None), state

    def telemetry(self, state: StaticState, progress: float) -> dict[str, float]:
        return {}
