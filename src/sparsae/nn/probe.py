"""Gradients at connections that do not exist.

A probe watches the forward and backward passes of sparse layers and computes, where it is told to, what the gradient
would be at inactive units: dY^T X at those units only, one layer at a time, nothing of a dense layer's size kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import choose_backend
from sparsae.nn.linear import SparseLinear


class GradientProbe:
    """While open, `gradients[name]` sums the gradients at `units[name]` over all backward passes.

    units: flat unit numbers by layer. gradients: (n,) or (n, b_out, b_in), in the order of the units, in the dtype of
    the layer's values. `tokens` counts the tokens of the watched backward passes, for the accounting.
    """

    def __init__(self, layers: Mapping[str, SparseLinear], units: Mapping[str, Tensor]) -> None:
        self.units = dict(units)
        self.gradients: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = dict.fromkeys(units, 0)
        self._hooks = [layers[name].register_forward_hook(self._watch(name)) for name in units]

    def close(self) -> None:
        """Stop watching; what was gathered stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self, name: str):  # type: ignore[no-untyped-def]
        def forward_hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and isinstance(layer, SparseLinear):
                x, target = args[0].detach(), layer
                output.register_hook(lambda dy: self._add(name, target, x, dy))

        return forward_hook

    def _add(self, name: str, layer: SparseLinear, x: Tensor, dy: Tensor) -> None:
        shape = (layer.out_features, layer.in_features)
        layout = Layout(shape, layer.unit, self.units[name].to(dy.device))
        backend = choose_backend(layer.backend, layout, dy.dtype)
        x_TI = x.reshape(-1, layer.in_features).to(dy.dtype)
        gradient = backend.sddmm(dy.reshape(-1, layer.out_features), x_TI, layout).to(layer.values.dtype)
        self.tokens[name] += x_TI.shape[0]
        seen = self.gradients.get(name)
        self.gradients[name] = gradient if seen is None else seen.add_(gradient)
