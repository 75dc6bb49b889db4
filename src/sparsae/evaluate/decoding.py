"""Next-token logits of one sequence that grows a token at a time.

A token through a small sparse model is so little arithmetic that transformers' own path spends most of its time between
the products. `FastDecoder` walks the blocks of a GPT-2 or Llama itself, with a key-value cache that never moves and
products that were prepared once; `ModelDecoder` serves everything else.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsae.kernels.registry import BACKENDS
from sparsae.models import attention_modules, decoder_and_head
from sparsae.nn.linear import SparseLinear
from sparsae.nn.mlp import hooked

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
    """The fastest decoder that serves a model. context: the longest sequence, in tokens."""
    if _is_plain(model):
        name = type(model).__name__
        if name == "GPT2LMHeadModel" and _is_standard_gpt2(model):
            return FastDecoder(model, _GPT2(model), context)
        if name == "LlamaForCausalLM" and _is_standard_llama(model):
            return FastDecoder(model, _Llama(model, context), context)
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
    # transformers names its cache `past_key_values`; later versions name it `cache` and warn of the former name.
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    output = decoder(input_ids=ids, use_cache=True, **{name: cache})
    return output.last_hidden_state, getattr(output, name)


class FastDecoder(Decoder):
    """Token by token through the blocks of an architecture, on the CPU in float32."""

    def __init__(self, model: nn.Module, architecture: _GPT2 | _Llama, context: int) -> None:
        self._model, self._blocks, self._length = model, architecture, 0
        shape = (architecture.layers, 2, 1, architecture.kv_heads, context, architecture.head_size)
        # keys and values: (layer, 2, 1, head, position, head size)
        self._cache = torch.empty(shape, dtype=torch.float32, device="cpu")
        # None where a version of transformers has no scaling: it multiplies by torch's own, 1 / sqrt(head size).
        self._scales = [getattr(attention, "scaling", None) for attention in attention_modules(model)]
        self._head = product(decoder_and_head(model)[1])

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
        for layer in range(self._blocks.layers):
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


class _GPT2:
    """The blocks of transformers' GPT2LMHeadModel."""

    def __init__(self, model: Any) -> None:
        config, decoder = model.config, model.transformer
        self.layers, self.kv_heads = config.n_layer, config.n_head
        self.head_size = config.n_embd // config.n_head
        self._tokens, self._positions = decoder.wte.weight, decoder.wpe.weight
        self.norm = _layer_norm(decoder.ln_f)
        self._blocks = [
            (
                _layer_norm(block.ln_1),
                product(block.attn.c_attn),
                product(block.attn.c_proj),
                _layer_norm(block.ln_2),
                product(block.mlp.c_fc),
                block.mlp.act,
                product(block.mlp.c_proj),
            )
            for block in decoder.h
        ]

    def embed(self, token: int, position: int) -> Tensor:
        return self._tokens[token : token + 1] + self._positions[position : position + 1]

    def block(self, layer: int, x: Tensor, position: int, attend: _Attend) -> Tensor:
        norm_1, qkv, out, norm_2, up, activation, down = self._blocks[layer]
        q, k, v = qkv(norm_1(x)).view(3, self.kv_heads, self.head_size)
        x = x + out(attend(layer, q[None, :, None], k, v))
        return x + down(activation(up(norm_2(x))))


class _Llama:
    """The blocks of transformers' LlamaForCausalLM."""

    def __init__(self, model: Any, context: int) -> None:
        config, decoder = model.config, model.model
        self.layers, self.heads, self.kv_heads = (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_size = decoder.layers[0].self_attn.head_dim
        self._tokens = decoder.embed_tokens.weight
        cos, sin = decoder.rotary_emb(self._tokens, torch.arange(context, device="cpu")[None])
        self._cos, self._sin = cos[0], sin[0]  # (context, head size)
        self.norm = _rms_norm(decoder.norm)
        self._blocks = [
            (
                _rms_norm(block.input_layernorm),
                *(product(getattr(block.self_attn, f"{name}_proj")) for name in "qkvo"),
                _rms_norm(block.post_attention_layernorm),
                *(product(getattr(block.mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
                block.mlp.act_fn,
            )
            for block in decoder.layers
        ]

    def embed(self, token: int, position: int) -> Tensor:
        return self._tokens[token : token + 1]

    def block(self, layer: int, x: Tensor, position: int, attend: _Attend) -> Tensor:
        norm_1, q, k, v, out, norm_2, gate, up, down, activation = self._blocks[layer]
        normed = norm_1(x)
        heads = [self._rotated(p(normed).view(-1, self.head_size), position) for p in (q, k)]
        values = v(normed).view(-1, self.head_size)
        x = x + out(attend(layer, heads[0][None, :, None], heads[1], values))
        normed = norm_2(x)
        return x + down(activation(gate(normed)) * up(normed))

    def _rotated(self, x: Tensor, position: int) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * self._cos[position] + turned * self._sin[position]


def product(layer: nn.Module) -> _Function:
    """x (1, in) to W x + b (1, out): prepared where a layer's backend does that, else the layer itself."""
    if isinstance(layer, SparseLinear):
        backend = BACKENDS[layer.kernel]
        if backend.token_refusal(layer.layout, layer.values.dtype) is None:
            return backend.token_product(layer.values.detach(), layer.layout, layer.bias)
    return layer


def _layer_norm(norm: Any) -> _Function:
    shape, weight, bias, epsilon = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: functional.layer_norm(x, shape, weight, bias, epsilon)


def _rms_norm(norm: Any) -> _Function:
    weight, epsilon = norm.weight, norm.variance_epsilon
    return lambda x: functional.rms_norm(x, weight.shape, weight, epsilon)


def _is_plain(model: nn.Module) -> bool:
    """Whether a model is evaluated on the CPU in float32 and nobody listens to its modules."""
    if model.training or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    return not any(hooked(module) for module in model.modules())


def _is_standard_gpt2(model: Any) -> bool:
    config = model.config
    unusual = (config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn, config.add_cross_attention)
    known = all(type(block.mlp).__name__ in ("GPT2MLP", "FusedMLP") for block in model.transformer.h)
    return known and config.scale_attn_weights and not any(unusual)


def _is_standard_llama(model: Any) -> bool:
    # The frequencies of other kinds of rotary positions depend on the length of the sequence.
    fixed = model.model.rotary_emb.rope_type in ("default", "linear", "yarn", "llama3")
    return fixed and all(type(block.mlp).__name__ in ("LlamaMLP", "FusedMLP") for block in model.model.layers)
