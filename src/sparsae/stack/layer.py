"""The sparse layers of one name of several runs, as one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsae.kernels.backend import Layout
from sparsae.kernels.probe import note_forward, open_probe
from sparsae.kernels.registry import BACKENDS
from sparsae.nn.linear import SparseLinear
from sparsae.nn.tracing import in_autocast
from sparsae.stack.across import across


class StackedLinear(nn.Module):
    """Y = X W^T + b for all runs, inside `torch.func.vmap`.

    The parameters are places for what `Operands` makes of the runs' layers. watched: the layers that have an open probe
    in the coming pass, by run; it is answered from the run's own dY and X, as where it trains alone.
    """

    def __init__(self, layer: SparseLinear) -> None:
        """layer: that of any of the runs."""
        super().__init__()
        self.weight_IO = _place(layer.in_features, layer.out_features)
        self.bias = None if layer.bias is None else _place(layer.out_features)
        self.watched: Mapping[int, SparseLinear] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) of one run; see `across`."""
        operands = (x, self.weight_IO) if self.bias is None else (x, self.weight_IO, self.bias)
        return across(self._product, *operands)

    def _product(self, x: Tensor, weights_RIO: Tensor, biases_RO: Tensor | None = None) -> Tensor:
        x_RTI, weights_RIO = in_autocast(x.flatten(1, -2)), in_autocast(weights_RIO)
        if biases_RO is not None:
            y_RTO = torch.baddbmm(in_autocast(biases_RO).unsqueeze(1), x_RTI, weights_RIO)
        else:
            y_RTO = torch.bmm(x_RTI, weights_RIO)
        if self.watched:
            _watch(self.watched, x_RTI.detach(), y_RTO)
        return y_RTO.view(*x.shape[:-1], -1)


class Operands:
    """What a `StackedLinear` multiplies by, made of the runs' layers, whose shapes and units are equal."""

    def __init__(self) -> None:
        self._indices: list[Tensor] = []
        self._places = torch.empty(0, dtype=torch.int64, device="cpu")

    def of(self, layers: Sequence[SparseLinear]) -> dict[str, Tensor]:
        """By the names of the parameters, the runs' axis first: weights (runs, in, out), scattered from the values.

        Runs may have any numbers of connections. The gradient reaches each run's values and biases.
        """
        indices = [layer.indices for layer in layers]
        if len(indices) != len(self._indices) or any(a is not b for a, b in zip(indices, self._indices, strict=True)):
            units = layers[0].topology.units
            self._places = torch.cat([t.long() + run * units for run, t in enumerate(indices)])
            self._indices = indices
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        return {"weight_IO": self._weights(layers)} | ({"bias": torch.stack(biases)} if biases else {})

    def _weights(self, layers: Sequence[SparseLinear]) -> Tensor:
        first, runs = layers[0], len(layers)
        (b_out, b_in), (rows, columns) = first.unit, first.topology.grid
        values = torch.cat([layer.values for layer in layers])
        units = values.new_zeros(runs * rows * columns, *values.shape[1:]).index_put((self._places,), values)
        blocks = units.view(runs, columns, rows, b_out, b_in).permute(0, 1, 4, 2, 3)
        return blocks.reshape(runs, first.in_features, first.out_features)


def _watch(layers: Mapping[int, SparseLinear], x_RTI: Tensor, y_RTO: Tensor) -> None:
    """Answer the probes of these runs' layers in the backward pass."""
    keys = {run: layer.key for run, layer in layers.items()}
    for key in keys.values():
        note_forward(key, trains=True)

    def answer(dy_RTO: Tensor) -> None:
        for run, layer in layers.items():
            if (probe := open_probe(keys[run])) is not None:
                layout = Layout(layer.topology.shape, layer.topology.unit, layer.topology.indices)
                probe.add(BACKENDS["reference"], layout, dy_RTO[run], x_RTI[run])

    y_RTO.register_hook(answer)


def _place(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
