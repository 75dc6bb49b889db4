"""Gradients at connections that do not exist.

A probe asks the backward pass of a layer for more than the gradient of its values: dY^T X at a sample of inactive
units, or where it is largest of all. The request lives beside the operator, not in hooks, so compiled graphs answer it
too, and one layer at a time is worked on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal
from weakref import WeakValueDictionary

from torch import Tensor

from sparsae.core.ranking import largest
from sparsae.kernels.backend import Backend, Layout

# Open requests by the address of a layer's index tensor. A probe holds that tensor, so the address is no other's while
# it lives, and is held here only weakly, so that it does not outlive whoever asked.
_open: WeakValueDictionary[int, Probe] = WeakValueDictionary()

# Units to look at, chosen in the backward pass from its (dY, X), (tokens, out) and (tokens, in).
Draw = Callable[[Tensor, Tensor], Tensor]


class Probe(ABC):
    """While open, watches the backward passes of one layer.

    units: (n,) flat numbers of inactive units, sorted; None before the first pass where that decides. gradient: None
    before the first pass, then what is known of the gradients there. positions: how many units' gradients were
    computed; tokens: over how many tokens.
    """

    units: Tensor | None = None
    gradient: Tensor | None = None
    positions = 0
    tokens = 0

    def __init__(self, indices: Tensor) -> None:
        """`indices` is the layer's own index tensor."""
        self._indices = indices
        _open[indices.data_ptr()] = self

    def close(self) -> None:
        """Stop; what was gathered stays."""
        if _open.get(self._indices.data_ptr()) is self:
            del _open[self._indices.data_ptr()]

    @abstractmethod
    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Take in one backward pass of the layer that `layout` describes."""


class SampledGradients(Probe):
    """The gradients at given units, or at those that the first backward pass draws, summed over the passes.

    gradient: (n,) or (n, b_out, b_in) in the dtype of the products.
    """

    def __init__(self, indices: Tensor, units: Tensor | Draw) -> None:
        super().__init__(indices)
        self._draw = None if isinstance(units, Tensor) else units
        self.units = units if isinstance(units, Tensor) else None

    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        if self.units is None:
            assert self._draw is not None
            self.units = self._draw(dy_TO, x_TI)
        wanted = Layout(layout.shape, layout.unit, self.units.to(dy_TO.device))
        gradient = backend.sddmm(dy_TO, x_TI, wanted)
        self.positions = self.units.numel()
        self.tokens += x_TI.shape[0]
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class LargestGradients(Probe):
    """The `count` inactive units with the largest gradients of all, by magnitude (L2 norm of a block).

    gradient: (count,) their magnitudes; active: (nnz,) or (blocks,) those of the active units. "last": the layer's
    dense gradient exists inside one backward pass, the last, and is freed there; `passes` is how many there will be,
    so that the earlier ones cost nothing (more than that many: the last one counts). "sum": of all passes, for which
    the layer's dense gradient is kept until `close`.
    """

    def __init__(self, indices: Tensor, count: int, accumulate: Literal["last", "sum"], passes: int = 1) -> None:
        super().__init__(indices)
        self.active: Tensor | None = None
        self._count, self._accumulate, self._left = count, accumulate, passes
        self._sum: Tensor | None = None
        self._layout: Layout | None = None

    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        self._left -= 1
        if self._accumulate == "last" and self._left > 0:
            return
        self.positions = layout.shape[0] * layout.shape[1] // (layout.unit[0] * layout.unit[1]) - layout.indices.numel()
        self.tokens += x_TI.shape[0]
        gradient_IO = x_TI.T @ dy_TO
        if self._accumulate == "last":
            self._reduce(gradient_IO, layout)
        else:
            self._sum = gradient_IO if self._sum is None else self._sum.add_(gradient_IO)
            self._layout = layout

    def close(self) -> None:
        super().close()
        if self._sum is not None and self._layout is not None:
            self._reduce(self._sum, self._layout)
            self._sum = None

    def _reduce(self, gradient_IO: Tensor, layout: Layout) -> None:
        """Keep what is wanted; overwrites the dense gradient, an (in, out) matrix in the order of the units."""
        b_out, b_in = layout.unit
        if layout.unit == (1, 1):
            magnitude = gradient_IO.abs_().view(-1)
        else:
            blocks = gradient_IO.square_().view(-1, b_in, layout.grid_rows, b_out)
            magnitude = blocks.sum((1, 3)).sqrt_().view(-1)
        self.active = magnitude.index_select(0, layout.indices)
        magnitude.index_fill_(0, layout.indices.long(), -1.0)
        units = largest(magnitude, min(self._count, self.positions))
        self.units, self.gradient = units.to(layout.indices.dtype), magnitude[units]


def open_probe(indices: Tensor) -> Probe | None:
    """The open probe of the layer with this index tensor."""
    return _open.get(indices.data_ptr()) if _open else None
