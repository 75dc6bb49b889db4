"""Out of `torch.func.vmap` for what is computed over all runs at once: attention, and the sparse layers' products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Of tensors whose first dimension goes by run.
Together = Callable[..., Tensor]


def across(function: Together, *tensors: Tensor) -> Tensor:
    """Inside `vmap`: what `function` makes of the tensors of all runs, the runs' axis first, as autograd sees it."""
    result: Tensor = _Across.apply(function, *tensors)
    return result


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(function: Together, *tensors: Tensor) -> Tensor:
        raise RuntimeError("a stacked layer computes inside torch.func.vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Torch wants one of what is transformed."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Together, *tensors: Tensor) -> tuple[Tensor, int]:
        stacked = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return function(*stacked), 0


ATTENTION = "sparsae_stacked"
LOOK = "sparsae_stacked_look"


def register_attention() -> None:
    """Make `ATTENTION` known to transformers: that of a single run, with the runs folded into the batch."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionInterface.register(LOOK, _look)
    AttentionMaskInterface.register(LOOK, sdpa_mask)


class HiddenTokensError(Exception):
    """Said by the attention `LOOK` that gets a mask which hides earlier tokens."""


def _look(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    from sparsae.nn.attention import attention_forward

    if attention_mask is not None:
        reached = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        if not torch.equal(reached, torch.ones_like(reached).tril()):
            raise HiddenTokensError
    return attention_forward(module, query, key, value, None, **settings)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    return across(partial(_folded, module, settings), query, key, value), None


def _folded(module: nn.Module, settings: dict[str, Any], *qkv_RBHTD: Tensor) -> Tensor:
    from sparsae.nn.attention import attention_forward

    runs = qkv_RBHTD[0].shape[0]
    query, key, value = (t.flatten(0, 1) for t in qkv_RBHTD)
    folded, _ = attention_forward(module, query, key, value, None, **settings)
    return folded.unflatten(0, (runs, -1))
