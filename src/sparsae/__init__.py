"""Sparsae trains neural networks that are sparse from the first step to the last.

    model = sparsify(model, sparsity=0.9)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10_000))

Importing this package imports nothing heavy: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsae.on_import import when_imported

if TYPE_CHECKING:
    from sparsae.config.rules import RuleConfig as RuleConfig
    from sparsae.config.rules import TermConfig as TermConfig
    from sparsae.config.span import Span as Span
    from sparsae.config.sparsifier import SparsifierConfig as SparsifierConfig
    from sparsae.core.cadence import Cadence as Cadence
    from sparsae.core.cadence import Cubic as Cubic
    from sparsae.core.cadence import Never as Never
    from sparsae.core.cadence import Once as Once
    from sparsae.core.cadence import Periodic as Periodic
    from sparsae.core.cadence import Window as Window
    from sparsae.core.groups import Groups as Groups
    from sparsae.core.heads import HeadLayout as HeadLayout
    from sparsae.core.observation import LayerView as LayerView
    from sparsae.core.observation import Observation as Observation
    from sparsae.core.observation import PastValues as PastValues
    from sparsae.core.swap import Swap as Swap
    from sparsae.core.topology import Topology as Topology
    from sparsae.errors import InputError as InputError
    from sparsae.families import FAMILIES as FAMILIES
    from sparsae.families import Family as Family
    from sparsae.kernels.backend import Backend as Backend
    from sparsae.kernels.backend import Layout as Layout
    from sparsae.kernels.registry import register_backend as register_backend
    from sparsae.losses import distillation_loss as distillation_loss
    from sparsae.nn.kinds.kind import KINDS as KINDS
    from sparsae.nn.kinds.kind import Kind as Kind
    from sparsae.nn.linear import SparseLinear as SparseLinear
    from sparsae.nn.linear import sparse_layers as sparse_layers
    from sparsae.nn.mlp import mlp_keeps as mlp_keeps
    from sparsae.nn.sparsify import densify as densify
    from sparsae.nn.sparsify import sparsify as sparsify
    from sparsae.nn.summary import summary as summary
    from sparsae.nn.tensors import load_model as load_model
    from sparsae.observers import OBSERVERS as OBSERVERS
    from sparsae.observers import Observer as Observer
    from sparsae.optim import AdamW as AdamW
    from sparsae.optim import parameter_groups as parameter_groups
    from sparsae.parameterization import Parameterization as Parameterization
    from sparsae.registry import RULES as RULES
    from sparsae.registry import TERMS as TERMS
    from sparsae.rules.parts.drop import Drop as Drop
    from sparsae.rules.parts.drop import RandomDrop as RandomDrop
    from sparsae.rules.parts.drop import SmallestMagnitude as SmallestMagnitude
    from sparsae.rules.parts.exchange import CosineFraction as CosineFraction
    from sparsae.rules.parts.exchange import Exchange as Exchange
    from sparsae.rules.parts.grow import Grow as Grow
    from sparsae.rules.parts.grow import Growth as Growth
    from sparsae.rules.parts.grow import LargestGradient as LargestGradient
    from sparsae.rules.parts.grow import LargestSampledGradient as LargestSampledGradient
    from sparsae.rules.parts.grow import RandomGrowth as RandomGrowth
    from sparsae.rules.parts.pruning import Pruning as Pruning
    from sparsae.rules.parts.rule import Candidate as Candidate
    from sparsae.rules.parts.rule import Decision as Decision
    from sparsae.rules.parts.rule import Rule as Rule
    from sparsae.score import Term as Term
    from sparsae.score import Trial as Trial
    from sparsae.search.sparsifier import Sparsifier as Sparsifier
    from sparsae.search.teacher import Teacher as Teacher

__version__ = "0.1.0"

# `from_pretrained` then knows what `save_pretrained` writes of a sparse model.
when_imported("transformers.modeling_utils", "sparsae.nn.stored.plug")
# And knows the attention of the native kernels by its name.
when_imported("transformers.modeling_utils", "sparsae.nn.attention")

_HOMES = {
    "AdamW": "sparsae.optim",
    "Backend": "sparsae.kernels.backend",
    "Cadence": "sparsae.core.cadence",
    "Candidate": "sparsae.rules.parts.rule",
    "CosineFraction": "sparsae.rules.parts.exchange",
    "Cubic": "sparsae.core.cadence",
    "Decision": "sparsae.rules.parts.rule",
    "Drop": "sparsae.rules.parts.drop",
    "Exchange": "sparsae.rules.parts.exchange",
    "FAMILIES": "sparsae.families",
    "Family": "sparsae.families",
    "Groups": "sparsae.core.groups",
    "Grow": "sparsae.rules.parts.grow",
    "Growth": "sparsae.rules.parts.grow",
    "HeadLayout": "sparsae.core.heads",
    "InputError": "sparsae.errors",
    "KINDS": "sparsae.nn.kinds.kind",
    "Kind": "sparsae.nn.kinds.kind",
    "LargestGradient": "sparsae.rules.parts.grow",
    "LargestSampledGradient": "sparsae.rules.parts.grow",
    "LayerView": "sparsae.core.observation",
    "Layout": "sparsae.kernels.backend",
    "Never": "sparsae.core.cadence",
    "OBSERVERS": "sparsae.observers",
    "Observation": "sparsae.core.observation",
    "Observer": "sparsae.observers",
    "Once": "sparsae.core.cadence",
    "Parameterization": "sparsae.parameterization",
    "PastValues": "sparsae.core.observation",
    "Periodic": "sparsae.core.cadence",
    "Pruning": "sparsae.rules.parts.pruning",
    "RULES": "sparsae.registry",
    "RandomDrop": "sparsae.rules.parts.drop",
    "RandomGrowth": "sparsae.rules.parts.grow",
    "Rule": "sparsae.rules.parts.rule",
    "RuleConfig": "sparsae.config.rules",
    "SmallestMagnitude": "sparsae.rules.parts.drop",
    "Span": "sparsae.config.span",
    "SparseLinear": "sparsae.nn.linear",
    "Sparsifier": "sparsae.search.sparsifier",
    "SparsifierConfig": "sparsae.config.sparsifier",
    "Swap": "sparsae.core.swap",
    "TERMS": "sparsae.registry",
    "Teacher": "sparsae.search.teacher",
    "Term": "sparsae.score",
    "TermConfig": "sparsae.config.rules",
    "Topology": "sparsae.core.topology",
    "Trial": "sparsae.score",
    "Window": "sparsae.core.cadence",
    "densify": "sparsae.nn.sparsify",
    "distillation_loss": "sparsae.losses",
    "load_model": "sparsae.nn.tensors",
    "mlp_keeps": "sparsae.nn.mlp",
    "parameter_groups": "sparsae.optim",
    "register_backend": "sparsae.kernels.registry",
    "sparse_layers": "sparsae.nn.linear",
    "sparsify": "sparsae.nn.sparsify",
    "summary": "sparsae.nn.summary",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsae' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
