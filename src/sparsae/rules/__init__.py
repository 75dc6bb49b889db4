"""Topology rules: which connections to drop and to grow. A rule is one file here, or in an installed package.

The settings of a rule are `from sparsae.rules import RiglConfig`; what rules are made of is in `sparsae.rules.parts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsae.errors import InputError
from sparsae.registry import RULES

if TYPE_CHECKING:
    from sparsae.config.rules import RuleConfig
    from sparsae.rules.evolution import AdaptationConfig as AdaptationConfig
    from sparsae.rules.evolution import EvolutionConfig as EvolutionConfig
    from sparsae.rules.evolution import ResetConfig as ResetConfig
    from sparsae.rules.generations import GenerationsConfig as GenerationsConfig
    from sparsae.rules.gmp import GmpConfig as GmpConfig
    from sparsae.rules.granet import GranetConfig as GranetConfig
    from sparsae.rules.gse import GseConfig as GseConfig
    from sparsae.rules.magnitude import MagnitudeConfig as MagnitudeConfig
    from sparsae.rules.parts.damage import DamageConfig as DamageConfig
    from sparsae.rules.parts.proxy import ProxyConfig as ProxyConfig
    from sparsae.rules.parts.rule import Rule
    from sparsae.rules.parts.strategy import StrategyConfig as StrategyConfig
    from sparsae.rules.rigl import RiglConfig as RiglConfig
    from sparsae.rules.set import SetConfig as SetConfig
    from sparsae.rules.static import StaticConfig as StaticConfig

_OF_EVOLUTION = {
    "AdaptationConfig": "evolution",
    "DamageConfig": "parts.damage",
    "ProxyConfig": "parts.proxy",
    "ResetConfig": "evolution",
    "StrategyConfig": "parts.strategy",
}


def build_rule(config: RuleConfig, others: Mapping[str, RuleConfig] | None = None) -> Rule[Any]:
    """The rule of a `topology` section, beside `others` for the layers whose names match their patterns first."""
    rule = _built(config)
    if not others:
        return rule
    from sparsae.rules.parts.several import Several

    return Several({pattern: _built(other) for pattern, other in others.items()} | {"*": rule})


def _built(config: RuleConfig) -> Rule[Any]:
    from sparsae.rules.parts.rule import Rule

    rule = RULES[config.rule].build(config)
    if not isinstance(rule, Rule):
        raise InputError(f"rule '{config.rule}': its registered function must return a Rule, not {rule!r}")
    for name in ("ramp", "ramp_first"):
        object.__setattr__(rule, name, getattr(config, name))  # of a rule that may be a frozen dataclass
    if rule.ramp and not rule.ramp_first and not rule.grows:
        raise InputError(
            f"topology.ramp: rule '{rule.name}' grows no connection: set ramp_first, for the first ones, or ramp 0"
        )
    return rule


def __getattr__(name: str) -> Any:
    home = _OF_EVOLUTION.get(name) or name.removesuffix("Config").lower()
    if not name.endswith("Config") or (name not in _OF_EVOLUTION and home not in RULES.own_names()):
        raise AttributeError(f"module 'sparsae.rules' has no attribute '{name}'")
    return getattr(import_module(f"sparsae.rules.{home}"), name)
