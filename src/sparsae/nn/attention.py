"""The attention of transformers' models: a backend's wherever one is right and pays.

It is known to transformers by a name (`attn_implementation="sparsae"`), from the import of its models on, and hands
over to transformers' own scaled dot product in all other cases. Not every model can take it: `attend` knows which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsae.kernels.backend import Backend
from sparsae.kernels.registry import attention_backend
from sparsae.nn.tracing import is_traced, transformed, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sparsae"


def attend(model: PreTrainedModel) -> None:
    """Let a model of transformers attend by `attention_forward`, where torch's scaled dot product is what it has now.

    Others (with position biases, sinks or capped scores) compute attention themselves, and would do so without a mask:
    they and those that look up no attention by its name stay as they are.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` of transformers returns for the same: (batch, tokens, heads, size), and no weights.

    query: (batch, heads, tokens, size). key and value: (batch, groups, tokens, size).
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and not dropout and causal and all(other in _PLAIN for other in _given(others))
    if plain and (backend := _backend(query, key, value)) is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return backend.attention(query, key, value, scale).transpose(1, 2), None
    y, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return y, None


# What models hand on to every attention, and causal attention over whole sequences has no use for.
_PLAIN = {"cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "position_ids", "sliding_window", "use_cache"}


def _given(others: dict[str, Any]) -> list[str]:
    return [name for name, other in others.items() if other is not None and other is not False]


def _backend(query: Tensor, key: Tensor, value: Tensor) -> Backend | None:
    # Whoever looks in sees torch's operators.
    if is_traced() or transformed() or torch.is_autocast_enabled(query.device.type):
        return None
    if any(watched(tensor) for tensor in (query, key, value)):
        return None
    return attention_backend(query, key, value)


def attention_mask_of(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """What `sdpa_mask` of transformers returns for the same, but no mask (None) where attention is causal and whole.

    There `sdpa_mask` makes one in compiled code, in versions that take what is compiled for what is exported.
    """
    whole = attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    near = local_size is None or kv_length < local_size
    if whole and near and allow_is_causal_skip and not torch.compiler.is_exporting():
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **others,
    )


class Uncached(Cache):
    """A cache that keeps nothing, for batches of whole sequences: keys and values are those of the pass itself.

    Without a cache, transformers looks whether a row has several sequences packed into it. It waits for the GPU to
    tell, in every forward pass; and compiled code, which cannot tell, gets a mask in place of causal attention.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


UNCACHED = Uncached()

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask_of)
