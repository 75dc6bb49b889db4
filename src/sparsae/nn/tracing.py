"""Who looks on while a layer computes: tracers, transforms, modes and autocast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing

from sparsae.errors import InputError


def by_operators() -> bool:
    """Whether torch's own operators on a dense weight have to compute.

    So it is where a graph is made that shall do without this package, and under what can look into them only.
    """
    return is_tracing() or (is_exporting() and torch.onnx.is_in_onnx_export()) or transformed()


def transformed() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap) or forward-mode differentiation sees what is computed."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Whether torch.export makes a graph. torch 2.11's compiler takes its own function for True in any graph."""
    return torch.compiler.is_exporting()


# As torch.compiler.assume_constant_result does, which would import the compiler: asked while a graph is made, whose
# guards know of transforms.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced() -> bool:
    return torch.compiler.is_compiling() or is_tracing()


def unwrapped(indices: Tensor) -> Tensor:
    """Indices as they were before transforms wrapped them. Raises InputError for those of several models at once."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(indices):
        if functorch.is_batchedtensor(indices):
            raise InputError("the indices of a sparse layer cannot be mapped over (torch.func.vmap): give in_dims None")
        indices = functorch.get_unwrapped(indices)
    return indices


def watched(x: Tensor) -> bool:
    """Whether operators on x are more than arithmetic: seen by a mode, or on another kind of tensor."""
    return type(x) is not Tensor or x.is_neg() or torch._C._len_torch_dispatch_stack() > 0


def in_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the autocast dtype, where autocast is on; float64 stays, as in torch."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
