"""Dense arithmetic over sparse storage, on any device.

The values are scattered into one scratch matrix, multiplied by the dense GEMM, and gradients are gathered back: storage
and optimizer see active units only, arithmetic costs what a dense layer's does. It is the oracle of every other
backend, and the fast path for unstructured topologies on a GPU.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from sparsae.kernels.backend import Backend, Layout


class Scratch(threading.local):
    """One buffer a device and thread, as large as the largest weight that passed through it, shared by all layers.

    Whoever takes a matrix from it owns it until the next taking in the same thread.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialized contiguous tensor of `shape`, with the dtype and device of `like`."""
        size = math.prod(shape) * like.element_size()
        buffer = self._buffers.get(like.device)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(like.device, None)
            # In inference mode it would be of no use for training afterwards.
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
            self._buffers[like.device] = buffer
        return buffer[:size].view(like.dtype).view(shape)

    def buffers(self) -> list[Tensor]:
        """This thread's buffers."""
        return list(self._buffers.values())


SCRATCH = Scratch()


class Reference(Backend):
    """Scatter, dense GEMM, gather. The scratch matrix is W^T, (in, out): unit order is then its memory order."""

    name = "reference"

    def refusal(self, unit: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def spmm(self, values: Tensor, layout: Layout, x_TI: Tensor, bias: Tensor | None = None) -> Tensor:
        weight_IO = self._scatter(values, layout)
        return x_TI @ weight_IO if bias is None else torch.addmm(bias, x_TI, weight_IO)

    def spmm_t(self, values: Tensor, layout: Layout, dy_TO: Tensor) -> Tensor:
        return dy_TO @ self._scatter(values, layout).T

    def sddmm(self, dy_TO: Tensor, x_TI: Tensor, layout: Layout) -> Tensor:
        out_features, in_features = layout.shape
        gradient_IO = SCRATCH.take((in_features, out_features), dy_TO)
        torch.mm(x_TI.T, dy_TO, out=gradient_IO)
        if layout.unit == (1, 1):
            return gradient_IO.view(-1).index_select(0, layout.indices)
        columns, rows = self._block_coordinates(layout)
        return self._blocks(gradient_IO, layout)[columns, rows].transpose(1, 2).contiguous()

    def _scatter(self, values: Tensor, layout: Layout) -> Tensor:
        weight_IO = SCRATCH.take((layout.shape[1], layout.shape[0]), values).zero_()
        if layout.unit == (1, 1):
            weight_IO.view(-1).scatter_(0, layout.indices.long(), values)
        else:
            self._blocks(weight_IO, layout).index_put_(self._block_coordinates(layout), values.transpose(1, 2))
        return weight_IO

    @staticmethod
    def _blocks(matrix_IO: Tensor, layout: Layout) -> Tensor:
        """View of an (in, out) matrix as (grid columns, grid rows, b_in, b_out)."""
        b_out, b_in = layout.unit
        return matrix_IO.view(-1, b_in, layout.grid_rows, b_out).transpose(1, 2)

    @staticmethod
    def _block_coordinates(layout: Layout) -> tuple[Tensor, Tensor]:
        indices = layout.indices.long()
        return indices // layout.grid_rows, indices % layout.grid_rows
