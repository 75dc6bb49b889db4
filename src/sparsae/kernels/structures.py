"""What the kernels read of a topology, and whether it is still that of the indices that a layer has.

A layer's `indices` are a buffer, which anybody may write: an average over a model's state, another model's state in a
functional call, a broadcast between ranks. The kernels never read it. They read *structures*, which nobody else has:

    [key, indices, *derived]     the layer's key (kernels/probe.py), its own indices, and what its backend derives

and every forward pass compares the buffer with them, which takes one pass over nnz integers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsae.errors import InputError
from sparsae.kernels.backend import Backend, Layout

CHANGED = (
    "the indices of a sparse layer were written in place: bring another topology in by load_state_dict (model and "
    "optimizer state) or set_topology; for an average of weights over moving topologies use the teacher "
    "(SparsifierConfig(teacher=TeacherConfig(enabled=True)))"
)

# Several times as fast as torch.equal, which a token at a time would notice.
_memcmp = None if sys.platform == "win32" else ctypes.CDLL(None).memcmp
if _memcmp is not None:
    _memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def key_and_layout(
    values: Tensor, structures: Sequence[Tensor], out_features: int, in_features: int
) -> tuple[Tensor, Layout]:
    """A layer's key, and its units as the backend gets them. Raises ValueError for values of another number of units.

    values: (nnz,) or (count, b_out, b_in).
    """
    key, indices, *derived = structures
    unit = (1, 1) if values.dim() == 1 else (values.shape[1], values.shape[2])
    layout = Layout((out_features, in_features), unit, indices, derived)
    if tuple(values.shape) != layout.values_shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, the layer's topology wants {layout.values_shape}")
    return key, layout


def multiplied(backend: Backend, values: Tensor, indices: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """The values to multiply by, and their layout, where `indices` are those of the layout.

    Else InputError on the CPU; elsewhere, where an answer would have to be waited for, values are NaN, or become so as
    the backend reads them.
    """
    if indices.device.type == "cpu":
        if not same_indices(indices, layout.indices):
            raise InputError(CHANGED)
        return values.data, layout
    if backend.compares:
        if indices.shape != layout.indices.shape:
            raise InputError(CHANGED)
        return values, layout._replace(seen=indices)
    return poisoned(values, indices, layout.indices), layout


def poisoned(values: Tensor, indices: Tensor, own: Tensor) -> Tensor:
    """The values, or NaN for each where the two index tensors differ, without waiting for the device."""
    if indices.shape != own.shape:
        raise InputError(CHANGED)
    return torch.where((indices == own).all(), values, torch.full_like(values, torch.nan))


def same_indices(one: Tensor, other: Tensor) -> bool:
    """Whether two index tensors hold the same numbers, whatever their dtypes and devices; on meta, none are held."""
    if one.is_meta or other.is_meta:
        return one is other
    if one.shape != other.shape or one.is_floating_point() or other.is_floating_point():
        return False
    if one.dtype != other.dtype or one.device != other.device:
        one = one.to(other.device, torch.int64)
        other = other.to(torch.int64)
    if _memcmp is None or not (one.is_cpu and one.is_contiguous() and other.is_contiguous()):
        return torch.equal(one, other)
    return bool(_memcmp(one.data_ptr(), other.data_ptr(), one.nbytes) == 0)
