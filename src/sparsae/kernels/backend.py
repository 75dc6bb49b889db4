"""What a backend is.

Everything numerical in a sparse layer is one of three products; X is (tokens, in), dY is (tokens, out):

    spmm(values, layout, X)    -> Y  (tokens, out)     forward
    spmm_t(values, layout, dY) -> dX (tokens, in)      backward to the input
    sddmm(dY, X, layout)       -> the gradient at any set of units: the active ones, or a sampled few
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsae.core.topology import Topology


class Layout(NamedTuple):
    """A set of units as the kernels get it: plain tensors and numbers that pass through a custom operator."""

    shape: tuple[int, int]
    unit: tuple[int, int]
    indices: Tensor
    derived: Sequence[Tensor] = ()

    @property
    def grid_rows(self) -> int:
        """Rows of the grid of units."""
        return self.shape[0] // self.unit[0]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """(count,), or (count, b_out, b_in) for blocks."""
        count = self.indices.numel()
        return (count,) if self.unit == (1, 1) else (count, *self.unit)


class Needs(NamedTuple):
    """Which of `Gradients` are asked for."""

    x: bool
    values: bool
    bias: bool


class Gradients(NamedTuple):
    """dX (tokens, in), dW at the units of a layout, and db (out,): None for one that was not asked for."""

    x: Tensor | None
    values: Tensor | None
    bias: Tensor | None


class Backend(ABC):
    """Computes the three primitives for the units, devices and dtypes that it does not refuse."""

    name: str

    @abstractmethod
    def refusal(self, unit: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve such layers here; None where it can. dtype: that of the values."""

    def pays(self, layout: Layout, dtype: torch.dtype) -> bool:
        """Whether this backend beats dense arithmetic over the same storage. Asked of backends that do not refuse."""
        return True

    def derive(self, topology: Topology) -> list[Tensor]:
        """Index structures that the kernels want beside the topology's own, made once a topology in O(nnz)."""
        return []

    @abstractmethod
    def spmm(self, values: Tensor, layout: Layout, x_TI: Tensor, bias: Tensor | None = None) -> Tensor:
        """Y = X W^T + b, a new (tokens, out) tensor."""

    @abstractmethod
    def spmm_t(self, values: Tensor, layout: Layout, dy_TO: Tensor) -> Tensor:
        """dX = dY W, a new (tokens, in) tensor."""

    @abstractmethod
    def sddmm(self, dy_TO: Tensor, x_TI: Tensor, layout: Layout) -> Tensor:
        """dW = dY^T X at the units of `layout` only, in `layout.values_shape`."""

    def backward(self, values: Tensor, layout: Layout, dy_TO: Tensor, x_TI: Tensor, needs: Needs) -> Gradients:
        """The gradients that are needed; x_TI is read for dW only."""
        return Gradients(
            self.spmm_t(values, layout, dy_TO) if needs.x else None,
            self.sddmm(dy_TO, x_TI, layout) if needs.values else None,
            dy_TO.sum(0) if needs.bias else None,
        )
