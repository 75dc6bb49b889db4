"""The topology that was drawn first stays.

With an Erdos-Renyi budget it is the baseline of Liu et al. (2022), The Unreasonable Effectiveness of Random Pruning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsae.config.rules import RuleConfig
from sparsae.core.observation import Observation
from sparsae.registry import RULES
from sparsae.rules.parts.rule import Candidate, NoState, Rule

if TYPE_CHECKING:
    import torch


class StaticConfig(RuleConfig):
    """Drops and grows nothing: the random topology of the start stays. The baseline of every other rule."""


@RULES.register("static", StaticConfig)
class Static(Rule[NoState]):
    """Never due: the baseline that every dynamic rule has to beat."""

    moves = False

    def __init__(self, config: StaticConfig) -> None:
        self.config = config

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        return []
