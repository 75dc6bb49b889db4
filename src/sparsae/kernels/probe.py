"""Gradients at connections that do not exist.

A probe asks the backward pass of a layer to also compute dY^T X at a given set of units: inactive ones, a sample of
them, or all. The request lives beside the operator, not in hooks, so compiled graphs answer it too, and one layer at
a time is worked on.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import Tensor

from sparsae.kernels.backend import Backend, Layout

# Open requests by the address of a layer's index tensor. A probe holds that tensor, so the address is no other's while
# it lives, and is held here only weakly, so that it does not outlive whoever asked.
_open: WeakValueDictionary[int, Probe] = WeakValueDictionary()


class Probe:
    """While open, `gradient` sums the gradients at `units` over the layer's backward passes.

    units: (n,) flat unit numbers. gradient: None before the first pass, then (n,) or (n, b_out, b_in) in the dtype of
    the products. tokens: how many tokens were seen.
    """

    def __init__(self, indices: Tensor, units: Tensor) -> None:
        """`indices` is the layer's own index tensor."""
        self._indices = indices
        self.units = units
        self.gradient: Tensor | None = None
        self.tokens = 0
        _open[indices.data_ptr()] = self

    def close(self) -> None:
        """Stop; what was gathered stays."""
        if _open.get(self._indices.data_ptr()) is self:
            del _open[self._indices.data_ptr()]

    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Take in one backward pass of the layer that `layout` describes."""
        wanted = Layout(layout.shape, layout.unit, self.units.to(dy_TO.device))
        gradient = backend.sddmm(dy_TO, x_TI, wanted)
        self.tokens += x_TI.shape[0]
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


def open_probe(indices: Tensor) -> Probe | None:
    """The open probe of the layer with this index tensor."""
    return _open.get(indices.data_ptr()) if _open else None
