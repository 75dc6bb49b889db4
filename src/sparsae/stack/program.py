"""The decoders of runs of equal shapes as one program, differentiable in each run's own parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from sparsae.errors import InputError
from sparsae.kernels.probe import probed
from sparsae.models import attention_modules, decoder_and_head, hidden_states
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify
from sparsae.stack.across import ATTENTION, LOOK, HiddenTokensError, register_attention
from sparsae.stack.layer import Operands, StackedLinear
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
        objective.compile_mode,
        str(objective.device),
    )


class StackedDecoder:
    """The decoders of several runs of one `shape_of`."""

    def __init__(self, decoder: Any, tokens_BT: Tensor, mode: str | None = None) -> None:
        """decoder: that of any of the runs; nothing of it is kept but its architecture. tokens: as the runs' own.

        mode: of torch.compile, for the passes in which no probe looks at a layer; None: nothing is compiled.

        Raises InputError for one whose attention is another than that of each token to itself and all before: computed
        by the decoder itself, or with a mask.
        """
        if decoder.config._attn_implementation not in ("sparsae", "sdpa"):
            raise InputError(f"{type(decoder).__name__} computes its attention itself: runs of it cannot be stacked")
        register_attention()
        layers = sparse_layers(decoder)
        template: Any = densify(copy.deepcopy(decoder))
        if _hides_tokens(template, tokens_BT):
            raise InputError(
                f"{type(decoder).__name__} does not attend to all {tokens_BT.shape[1]} tokens (model.context): runs of "
                "it cannot be stacked"
            )
        template.to("meta")
        template.config._attn_implementation = ATTENTION
        self._layers = {name: StackedLinear(layer) for name, layer in layers.items()}
        for name, layer in self._layers.items():
            template.set_submodule(name, layer)
        self._program = _program(template.train())
        self._compiled, self._size = None if mode is None else _compiled(self._program, mode), 0
        self._operands = {name: Operands() for name in layers}
        self._members: WeakKeyDictionary[nn.Module, _Member] = WeakKeyDictionary()

    def hidden_states(self, decoders: Sequence[nn.Module], tokens_RBT: Tensor) -> Tensor:
        """(runs, B * T, width); the gradient reaches the parameters of `decoders`."""
        members, rows = [self._member(decoder) for decoder in decoders], len(decoders)
        program: Callable[..., Tensor] = self._program
        if self._compiled is not None and not any(member.probed() for member in members):
            program, more = self._compiled, self._room(rows) - rows
            members += members[:1] * more
            tokens_RBT = torch.cat([tokens_RBT, tokens_RBT[:1].expand(more, -1, -1)])
        own = {name: torch.stack([member.dense[name] for member in members]) for name in members[0].dense}
        for name, layer in self._layers.items():
            sparse = [member.sparse[name] for member in members]
            own |= {f"{name}.{key}": operand for key, operand in self._operands[name].of(sparse).items()}
            layer.watched = {run: each for run, each in enumerate(sparse) if probed([each.key])}
        # What is computed from the architecture alone, such as rotary frequencies, is equal in all runs.
        try:
            return program(own, members[0].buffers, tokens_RBT)[:rows]
        finally:
            for layer in self._layers.values():
                layer.watched = {}

    def release(self) -> None:
        """Keep nothing of the runs of the last pass, which are over; what was compiled stays."""
        self._operands = {name: Operands() for name in self._operands}

    def _room(self, count: int) -> int:
        """For how many runs a graph is made, so that there are few: the most so far, the half, the quarter, ..."""
        room = self._size = max(self._size, count)
        while (half := (room + 1) // 2) >= count and half < room:
            room = half
        return room

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


@torch.no_grad()
def _hides_tokens(decoder: Any, tokens_BT: Tensor) -> bool:
    """Whether a mask hides earlier tokens there, as that of a sliding window does; `ATTENTION` gets none."""
    decoder.config._attn_implementation = LOOK
    try:
        hidden_states(decoder, tokens_BT)
    except HiddenTokensError:
        return True
    return False


def _program(template: Any) -> Callable[..., Tensor]:
    """Hidden states of all runs; it refers to nothing of them, since the compiler keeps what it has compiled."""

    def program(stacked: dict[str, Tensor], shared: dict[str, Tensor], tokens_RBT: Tensor) -> Tensor:
        """stacked: what runs have of their own, by the names of the template's parameters, the runs' axis first."""

        def one(own: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
            return hidden_states(lambda **given: functional_call(template, own | shared, (), given), tokens_BT)

        result: Tensor = vmap(one)(stacked, tokens_RBT)
        return result

    return program


def _compiled(program: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """One graph of all runs: traced with the tensors, since the compiler's reader of Python knows no `across`."""
    traced = torch.compiler.allow_in_graph(program)

    def call(*given: Any) -> Tensor:
        result: Tensor = traced(*given)
        return result

    # The compiler keeps its graphs with a function's code, and would take that of another program with equal tensors.
    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)

    def quietly(*given: Any) -> Tensor:
        with warnings.catch_warnings():
            # The compiler looks at the gradients of what it gets, which is computed here and has none of its own.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            result: Tensor = compiled(*given)
        return result

    return quietly


@dataclass(frozen=True, eq=False)
class _Member:
    """A run's decoder: its sparse layers, its parameters of no sparse layer, and its buffers, by name."""

    sparse: dict[str, SparseLinear]
    dense: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def probed(self) -> bool:
        """Whether a probe is open at one of the sparse layers."""
        return probed(layer.key for layer in self.sparse.values())
