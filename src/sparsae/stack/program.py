"""The decoders of runs of equal shapes as one program, differentiable in each run's own parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from sparsae.errors import InputError
from sparsae.models import attention_modules, decoder_and_head, hidden_states
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify
from sparsae.stack.across import ATTENTION, register_attention
from sparsae.stack.layer import StackedLinear
from sparsae.train.objective import Objective

Shape = tuple[Any, ...]


def shape_of(objective: Objective, batch: Tensor) -> Shape:
    """What runs have in common that one program can train: all that a forward pass is but for values and indices."""
    decoder: Any = decoder_and_head(objective.model)[0]
    layers = sparse_layers(decoder)
    return (
        decoder.config.to_json_string(),
        tuple(getattr(module, "scaling", None) for module in attention_modules(decoder)),
        tuple((name, layer.unit, layer.bias is None) for name, layer in layers.items()),
        tuple(batch.shape),
        objective.precision,
        str(objective.device),
    )


class StackedDecoder:
    """The decoders of several runs of one `shape_of`."""

    def __init__(self, decoder: Any) -> None:
        """decoder: that of any of the runs; nothing of it is kept but its architecture.

        Raises InputError for one that computes its attention itself: it would do so without a mask.
        """
        if decoder.config._attn_implementation not in ("sparsae", "sdpa"):
            raise InputError(f"{type(decoder).__name__} computes its attention itself: runs of it cannot be stacked")
        register_attention()
        names = list(sparse_layers(decoder))
        template: Any = densify(copy.deepcopy(decoder)).to("meta")
        template.config._attn_implementation = ATTENTION
        self._layers = {name: StackedLinear() for name in names}
        for name, layer in self._layers.items():
            template.set_submodule(name, layer)
        self._template = template.train()
        self._members: WeakKeyDictionary[nn.Module, _Member] = WeakKeyDictionary()

    def hidden_states(self, decoders: Sequence[nn.Module], tokens_RBT: Tensor) -> Tensor:
        """(runs, B * T, width); the gradient reaches the parameters of `decoders`."""
        members = [self._member(decoder) for decoder in decoders]
        for name, layer in self._layers.items():
            layer.take([member.sparse[name] for member in members])
        stacked = {name: torch.stack([member.dense[name] for member in members]) for name in members[0].dense}
        # What is computed from the architecture alone, such as rotary frequencies, is equal in all runs.
        shared = members[0].buffers

        def one(own: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
            return hidden_states(lambda **given: functional_call(self._template, own | shared, (), given), tokens_BT)

        result: Tensor = vmap(one)(stacked, tokens_RBT)
        return result

    def _member(self, decoder: nn.Module) -> _Member:
        """Looked up once a run: a parameter stays the same object as long as its model trains."""
        if decoder not in self._members:
            sparse = sparse_layers(decoder)
            own = {id(tensor) for layer in sparse.values() for tensor in (layer.values, layer.bias, layer.indices)}
            self._members[decoder] = _Member(
                sparse,
                {name: p for name, p in decoder.named_parameters() if id(p) not in own},
                {name: buffer for name, buffer in decoder.named_buffers() if id(buffer) not in own},
            )
        return self._members[decoder]


@dataclass(frozen=True, eq=False)
class _Member:
    """A run's decoder: its sparse layers, its parameters of no sparse layer, and its buffers, by name."""

    sparse: dict[str, SparseLinear]
    dense: dict[str, Tensor]
    buffers: dict[str, Tensor]
