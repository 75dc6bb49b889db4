"""Topology rules: which connections to drop and to grow. A new rule is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsae.config.schema import RuleConfig
from sparsae.rules.base import Rule
from sparsae.rules.evolution import Evolution
from sparsae.rules.static import Static

RULES: dict[str, Callable[[Any], Rule[Any]]] = {
    "static": Static,
    "evolution": Evolution,
}


def build_rule(config: RuleConfig) -> Rule[Any]:
    """The rule of a `topology` section."""
    return RULES[config.rule](config)
