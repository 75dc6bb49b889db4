"""Topology rules: which connections to drop and to grow. A new rule is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsae.config.topology import RuleConfig
from sparsae.rules.base import Rule
from sparsae.rules.evolution import Evolution
from sparsae.rules.gmp import Gmp
from sparsae.rules.granet import Granet
from sparsae.rules.gse import Gse
from sparsae.rules.magnitude import Magnitude
from sparsae.rules.rigl import Rigl
from sparsae.rules.set import Set
from sparsae.rules.static import Static

RULES: dict[str, Callable[[Any], Rule[Any]]] = {
    "static": Static,
    "set": Set,
    "rigl": Rigl,
    "gse": Gse,
    "gmp": Gmp,
    "granet": Granet,
    "magnitude": Magnitude,
    "evolution": Evolution,
}


def build_rule(config: RuleConfig) -> Rule[Any]:
    """The rule of a `topology` section."""
    return RULES[config.rule](config)
