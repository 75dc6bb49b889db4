"""Causal attention over whole sequences by the native kernels, and by plain operations: its twin for tests.

    y = softmax(scale q k^T) v,    each query with the keys up to its own

Neither probabilities nor scores reach memory: what is kept for the backward pass is, beside the inputs and y, the
logarithm of each row's sum.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsae.kernels.cpu.library import Attention, Heads, library


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> Tensor:
    """y (batch, heads, tokens, size) as float32, laid out in memory as (batch, tokens, heads, size).

    q: (batch, heads, tokens, size). k and v: (batch, groups, tokens, size), each group shared by heads / groups
    heads in a row. Raises ValueError for anything but float32 on the CPU of shapes that fit together.
    """
    y: Tensor = _CausalAttention.apply(q_BHTD, k_BGTD, v_BGTD, scale)
    return y


def causal_attention_reference(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> Tensor:
    """The same by whole matrices of probabilities, in any dtype."""
    shared, tokens = q_BHTD.shape[1] // k_BGTD.shape[1], q_BHTD.shape[2]
    k, v = (t.repeat_interleave(shared, 1) for t in (k_BGTD, v_BGTD))
    future = torch.ones(tokens, tokens, dtype=torch.bool, device="cpu").triu(1)
    return (scale * q_BHTD @ k.transpose(-1, -2)).masked_fill(future, -torch.inf).softmax(-1) @ v


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (_rows(t) for t in (q, k, v))
        y, logsum = _like(q), torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
        _call("sparsae_attention_forward", _problem(q, k, v, y, logsum, scale))
        ctx.save_for_backward(q, k, v, y, logsum)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, logsum = ctx.saved_tensors
        dy, dq, dk, dv = _rows(dy), _like(q), _like(k), _like(v)
        _require("dy", dy, q.shape)
        problem = _problem(q, k, v, y, logsum, ctx.scale)
        problem.dy, problem.dq, problem.dk, problem.dv = map(_heads, (dy, dq, dk, dv))
        _call("sparsae_attention_backward", problem)
        return dq, dk, dv, None


def _problem(q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsum: Tensor, scale: float) -> Attention:
    batch, heads, tokens, size = q.shape
    groups = k.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} heads of keys")
    _require("q", q, q.shape)
    for name, tensor in (("k", k), ("v", v)):
        _require(name, tensor, (batch, groups, tokens, size))
    return Attention(
        *(batch, heads, groups, tokens, size),
        *map(_heads, (q, k, v, y)),
        logsum=logsum.data_ptr(),
        scale=scale,
        threads=torch.get_num_threads(),
    )


def _require(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, not float32 on cpu")


def _rows(tensor: Tensor) -> Tensor:
    """With the features of a token side by side."""
    return tensor if tensor.dim() == 4 and tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    """(batch, heads, tokens, size), a token's heads side by side: as projections take and give them."""
    batch, heads, tokens, size = tensor.shape
    return torch.empty(batch, tokens, heads, size, dtype=torch.float32, device="cpu").transpose(1, 2)


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor.data_ptr(), *tensor.stride()[:3])


def _call(function: str, problem: Attention) -> None:
    if getattr(library(), function)(ctypes.byref(problem)):
        raise MemoryError("no memory left for the native kernels' workspace")
