"""Next-token logits of one sequence that grows a token at a time.

A token through a small sparse model is so little arithmetic that transformers' own path spends most of its time between
the products. `FastDecoder` walks the blocks of a family itself, with a key-value cache that never moves and products
that were prepared once, all blocks in one call where one backend has every weight of them; `ModelDecoder` serves
everything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsae.families import FAMILIES, Family
from sparsae.kernels.backend import TokenBlock, TokenNorm, TokenShape, Weight
from sparsae.kernels.registry import BACKENDS
from sparsae.models import attention_modules, cache_name, decoder_and_head
from sparsae.nn.linear import SparseLinear
from sparsae.nn.mlp import FusedMLP, hooked, kernel_of

_Function = Callable[[Tensor], Tensor]


class Decoder(ABC):
    """Reads a sequence, then goes on by single tokens."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> Tensor:
        """(vocabulary,) logits after these tokens, which begin a new sequence."""

    @abstractmethod
    def step(self, token: int) -> Tensor:
        """(vocabulary,) logits after one more token of the sequence."""


def open_decoder(model: nn.Module, context: int) -> Decoder:
    """The fastest decoder that serves a model, whose weights it prepared: open another one once they have changed.

    context: the longest sequence, in tokens.
    """
    family = FAMILIES.of(model)
    if family is not None and _is_evaluated(model) and _is_plain(model, family):
        return FastDecoder(model, Blocks(model, family, context), context)
    return ModelDecoder(model)


class ModelDecoder(Decoder):
    """By the model's own forward pass and cache."""

    def __init__(self, model: nn.Module) -> None:
        self._decoder, self._head = decoder_and_head(model)
        self._device = next(model.parameters()).device
        self._cache: Any = None

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        self._cache = None
        return self._continue(tokens)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        return self._continue([token])

    def _continue(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens], dtype=torch.int64, device=self._device)
        hidden, self._cache = _forward(self._decoder, ids, self._cache)
        return self._head(hidden[0, -1]).float()


def _forward(decoder: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Last hidden states (1, tokens, width) after ids (1, tokens) that go on from the cache, and the new cache."""
    name = cache_name(decoder) or "past_key_values"
    output = decoder(input_ids=ids, use_cache=True, **{name: cache})
    return output.last_hidden_state, getattr(output, name)


class FastDecoder(Decoder):
    """Token by token through the blocks of a family, on the CPU in float32."""

    def __init__(self, model: nn.Module, blocks: Blocks, context: int) -> None:
        self._model, self._blocks, self._length = model, blocks, 0
        shape = (len(blocks), 2, 1, blocks.kv_heads, context, blocks.head_size)
        # keys and values: (layer, 2, 1, head, position, head size)
        self._cache = torch.empty(shape, dtype=torch.float32, device="cpu")
        # None where a version of transformers has no scaling: it multiplies by torch's own, 1 / sqrt(head size).
        self._scales = [getattr(attention, "scaling", None) for attention in attention_modules(model)]
        self._head = product(decoder_and_head(model)[1])
        self._at_once = _at_once(blocks, self._scales, self._cache)

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        decoder = decoder_and_head(self._model)[0]
        hidden, cache = _forward(decoder, torch.tensor([tokens], dtype=torch.int64, device="cpu"))
        self._length = len(tokens)
        for layer, kept in enumerate(cache.layers):
            self._cache[layer, 0, :, :, : self._length] = kept.keys
            self._cache[layer, 1, :, :, : self._length] = kept.values
        return self._head(hidden[:, -1])[0].clone()

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        position = self._length
        self._length += 1
        x = self._blocks.embed(token, position)  # (1, width)
        if self._at_once is not None:
            x = self._at_once(x, position)
        else:
            for layer in range(len(self._blocks)):
                x = self._blocks.block(layer, x, position, self._attend)
        return self._head(self._blocks.norm(x))[0].clone()

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (1, heads, 1, size); k, v: (kv heads, size) of the newest token. Returns (1, heads * size)."""
        keys, values = self._cache[layer]
        keys[0, :, self._length - 1] = k
        values[0, :, self._length - 1] = v
        past, grouped = slice(0, self._length), q.shape[1] != keys.shape[1]
        out = functional.scaled_dot_product_attention(
            q, keys[:, :, past], values[:, :, past], scale=self._scales[layer], enable_gqa=grouped
        )
        return out.reshape(1, -1)


_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Block:
    """The functions of one block, each of x (1, in)."""

    norm_1: _Function
    projections: Sequence[_Function]
    head_norms: Sequence[_Function]
    output: _Function
    norm_2: _Function
    up: _Function
    gate: _Function | None
    activation: _Function
    down: _Function


class Blocks:
    """The blocks of a model of a family, with what is before and after them."""

    def __init__(self, model: Any, family: Family, context: int) -> None:
        blocks, config = model.get_submodule(family.blocks), model.config
        attention = getattr(blocks[0], family.attention)
        self.heads, self.head_size = config.num_attention_heads, attention.head_dim
        self.kv_heads = getattr(config, "num_key_value_heads", self.heads)
        self.family, self.modules = family, list(blocks)
        self._sizes = [size * self.head_size for size in (self.heads, self.kv_heads, self.kv_heads)]
        self._tokens = model.get_input_embeddings().weight
        self._positions = None if family.positions is None else model.get_submodule(family.positions).weight
        if self._positions is None:
            cos, sin = model.base_model.rotary_emb(self._tokens, torch.arange(context, device="cpu")[None])
            self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()  # (context, head size)
        self.norm = _norm(model.get_submodule(family.final_norm))
        self._blocks = [_block(block, family) for block in blocks]

    def __len__(self) -> int:
        return len(self._blocks)

    def shape(self, context: int) -> TokenShape:
        """What all blocks share."""
        rotary = (None, None) if self._positions is not None else (self._cos, self._sin)
        return TokenShape(self._tokens.shape[1], self.heads, self.kv_heads, self.head_size, context, *rotary)

    def embed(self, token: int, position: int) -> Tensor:
        """(1, width) of a token, before the first block."""
        x = self._tokens[token : token + 1]
        return x if self._positions is None else x + self._positions[position : position + 1]

    def embed_tensors(self, token: Tensor, position: Tensor) -> Tensor:
        """The same of tensors (1,), for who traces it."""
        x = functional.embedding(token, self._tokens)
        return x if self._positions is None else x + functional.embedding(position, self._positions)

    def block(self, layer: int, x: Tensor, position: int | Tensor, attend: _Attend) -> Tensor:
        """x: (1, width), before and after a block."""
        block = self._blocks[layer]
        normed = block.norm_1(x)
        parts = [project(normed) for project in block.projections]
        if len(parts) == 1:
            parts = list(parts[0].split(self._sizes, dim=-1))
        q, k, v = (part.view(-1, self.head_size) for part in parts)
        if block.head_norms:
            q, k = (norm(part) for norm, part in zip(block.head_norms, (q, k), strict=True))
        if self._positions is None:
            q, k = self._rotated(q, position), self._rotated(k, position)
        x = x + block.output(attend(layer, q[None, :, None], k, v))
        normed = block.norm_2(x)
        if block.gate is None:
            return x + block.down(block.activation(block.up(normed)))
        return x + block.down(block.activation(block.gate(normed)) * block.up(normed))

    def _rotated(self, x: Tensor, position: int | Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * self._cos[position] + turned * self._sin[position]


def _block(block: nn.Module, family: Family) -> _Block:
    attention, mlp = getattr(block, family.attention), getattr(block, family.mlp)
    norm_1, norm_2 = (_norm(getattr(block, name)) for name in family.norms)
    return _Block(
        norm_1,
        [product(getattr(attention, name)) for name in family.projections],
        [_norm(getattr(attention, name)) for name in family.head_norms or ()],
        product(getattr(attention, family.output)),
        norm_2,
        product(getattr(mlp, family.up)),
        None if family.gate is None else product(getattr(mlp, family.gate)),
        getattr(mlp, family.activation),
        product(getattr(mlp, family.down)),
    )


def _at_once(blocks: Blocks, scales: Sequence[float | None], cache: Tensor) -> Callable[[Tensor, int], Tensor] | None:
    """All blocks in one call, by the backend that has every weight of them; None where there is none."""
    given = [
        _token_block(module, blocks.family, blocks.head_size**-0.5 if scale is None else scale)
        for module, scale in zip(blocks.modules, scales, strict=True)
    ]
    whole = [block for block in given if block is not None]
    names = {layer.kernel for module in blocks.modules for layer in module.modules() if isinstance(layer, SparseLinear)}
    if len(whole) < len(given) or len(names) != 1:
        return None
    backend = BACKENDS[names.pop()]
    if any(backend.token_refusal(w.layout, w.values.dtype) for block in whole for w in block.weights):
        return None
    return backend.token_blocks(whole, blocks.shape(cache.shape[4]), cache)


def _token_block(block: nn.Module, family: Family, scale: float) -> TokenBlock | None:
    """A block as a backend gets it; None where one of its layers is dense, or its activation is none that is known."""
    attention, mlp = getattr(block, family.attention), getattr(block, family.mlp)
    names = [*((attention, name) for name in (*family.projections, family.output))]
    names += [(mlp, name) for name in (family.up, family.down, *([family.gate] if family.gate else []))]
    layers = [getattr(module, name) for module, name in names]
    activation = kernel_of(getattr(mlp, family.activation))
    if activation is None or not all(isinstance(layer, SparseLinear) for layer in layers):
        return None
    weights = [Weight(layer.values.detach(), layer.bias, layer.layout) for layer in layers]
    *projections, output = weights[: len(family.projections) + 1]
    up, down, *gate = weights[len(family.projections) + 1 :]
    norm_1, norm_2 = (_token_norm(getattr(block, name)) for name in family.norms)
    heads = [_token_norm(getattr(attention, name)) for name in family.head_norms or ()]
    return TokenBlock(
        norm_1,
        projections,
        (heads[0], heads[1]) if heads else None,
        scale,
        output,
        norm_2,
        up,
        gate[0] if gate else None,
        down,
        activation,
    )


def _token_norm(norm: Any) -> TokenNorm:
    if isinstance(norm, nn.LayerNorm):
        return TokenNorm(norm.weight, norm.bias, norm.eps, centered=True)
    return TokenNorm(norm.weight, None, norm.variance_epsilon, centered=False)


def product(layer: nn.Module) -> _Function:
    """x (1, in) to W x + b (1, out): prepared where a layer's backend does that, else the layer itself."""
    if isinstance(layer, SparseLinear):
        backend = BACKENDS[layer.kernel]
        if backend.token_refusal(layer.layout, layer.values.dtype) is None:
            return backend.token_product(layer.values.detach(), layer.layout, layer.bias)
    return layer


def _norm(norm: Any) -> _Function:
    if isinstance(norm, nn.LayerNorm):
        shape, scale, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
        return lambda x: functional.layer_norm(x, shape, scale, bias, eps)
    weight, epsilon = norm.weight, norm.variance_epsilon
    return lambda x: functional.rms_norm(x, weight.shape, weight, epsilon)


def _is_evaluated(model: nn.Module) -> bool:
    """Whether a model is evaluated on the CPU in float32 and nobody listens to its modules."""
    if model.training or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    return not any(hooked(module) for module in model.modules())


# Whose forward passes are known; a class of somebody else's that has none of its own computes as these do.
_OWN = frozenset({"sparsae", "torch", "transformers"})


def _is_plain(model: Any, family: Family) -> bool:
    """Whether a model's own pass is the one that the facts of its family tell, and no module is anybody else's."""
    if type(model).__name__ != family.model_class or any(
        getattr(model.config, name, value) != value for name, value in family.plain.items()
    ):
        return False
    if not all(type(module).forward.__module__.partition(".")[0] in _OWN for module in model.modules()):
        return False
    # A part may have been replaced by another of torch's.
    blocks, parts = list(model.get_submodule(family.blocks)), (family.attention, family.mlp, *family.norms)
    if not all(hasattr(block, part) for block in blocks for part in parts):
        return False
    norms = [model.get_submodule(family.final_norm), *(getattr(b, name) for b in blocks for name in family.norms)]
    if not all(isinstance(norm, nn.LayerNorm) or hasattr(norm, "variance_epsilon") for norm in norms):
        return False
    # The frequencies of other kinds of rotary positions depend on the length of the sequence.
    fixed = ("default", "linear", "yarn", "llama3")
    if family.positions is None and model.base_model.rotary_emb.rope_type not in fixed:
        return False
    mlps = (getattr(block, family.mlp) for block in blocks)
    return all(type(mlp).__name__ in (family.mlp_class, FusedMLP.__name__) for mlp in mlps)
