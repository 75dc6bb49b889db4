"""Sparsae trains neural networks that are sparse from the first step to the last.

    model = sparsify(model, sparsity=0.9)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10_000))

Importing this package imports nothing heavy: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsae.core.topology import Topology as Topology
    from sparsae.errors import InputError as InputError
    from sparsae.losses import distillation_loss as distillation_loss
    from sparsae.nn.linear import SparseLinear as SparseLinear
    from sparsae.nn.sparsify import densify as densify
    from sparsae.nn.sparsify import sparsify as sparsify
    from sparsae.nn.summary import summary as summary
    from sparsae.optim import AdamW as AdamW
    from sparsae.optim import parameter_groups as parameter_groups
    from sparsae.parameterization import Parameterization as Parameterization
    from sparsae.surgery import Swap as Swap
    from sparsae.train.sparsifier import Sparsifier as Sparsifier
    from sparsae.train.sparsifier import SparsifierConfig as SparsifierConfig

__version__ = "0.1.0"

_HOMES = {
    "AdamW": "sparsae.optim",
    "InputError": "sparsae.errors",
    "Parameterization": "sparsae.parameterization",
    "SparseLinear": "sparsae.nn.linear",
    "Sparsifier": "sparsae.train.sparsifier",
    "SparsifierConfig": "sparsae.train.sparsifier",
    "Swap": "sparsae.surgery",
    "Topology": "sparsae.core.topology",
    "densify": "sparsae.nn.sparsify",
    "distillation_loss": "sparsae.losses",
    "parameter_groups": "sparsae.optim",
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
