"""The sparse layers of one name of several runs, as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsae.kernels.backend import Layout
from sparsae.kernels.probe import note_forward, open_probe
from sparsae.kernels.registry import BACKENDS
from sparsae.nn.linear import SparseLinear
from sparsae.nn.tracing import in_autocast
from sparsae.stack.across import across


class StackedLinear(nn.Module):
    """Y = X W^T + b for all runs, inside `torch.func.vmap`, with W^T scattered from the runs' own values.

    Runs may have any numbers of connections. The gradient reaches each run's values, and its open probes are answered
    from its own dY and X, as where it trains alone.
    """

    def __init__(self, layer: SparseLinear) -> None:
        """layer: that of any of the runs. The parameters are places for those of the runs (`operands`)."""
        super().__init__()
        self.weight_IO = _place(layer.in_features, layer.out_features)
        self.bias = None if layer.bias is None else _place(layer.out_features)
        self._layers: Sequence[SparseLinear] = ()
        self._indices: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._places = torch.empty(0, dtype=torch.int64, device="cpu")

    def take(self, layers: Sequence[SparseLinear]) -> None:
        """The runs' layers of the coming pass, in the order of the runs; their shapes and units are equal."""
        indices = [layer.indices for layer in layers]
        self._layers = layers
        if len(indices) != len(self._indices) or any(a is not b for a, b in zip(indices, self._indices, strict=True)):
            units = layers[0].topology.units
            self._places = torch.cat([t.long() + run * units for run, t in enumerate(indices)])
            self._indices, self._keys = indices, [layer.key for layer in layers]

    def operands(self) -> dict[str, Tensor]:
        """What `forward` gets of each run by the names of the parameters, the runs' axis first, differentiable."""
        biases: list[Tensor] = [layer.bias for layer in self._layers if layer.bias is not None]
        return {"weight_IO": self._weights()} | ({"bias": torch.stack(biases)} if biases else {})

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) of one run; see `across`."""
        operands = (x, self.weight_IO) if self.bias is None else (x, self.weight_IO, self.bias)
        return across(self._product, *operands)

    def _weights(self) -> Tensor:
        """(runs, in, out), differentiable with respect to each run's values."""
        first, runs = self._layers[0], len(self._layers)
        (b_out, b_in), (rows, columns) = first.unit, first.topology.grid
        values = torch.cat([layer.values for layer in self._layers])
        units = values.new_zeros(runs * rows * columns, *values.shape[1:]).index_put((self._places,), values)
        blocks = units.view(runs, columns, rows, b_out, b_in).permute(0, 1, 4, 2, 3)
        return blocks.reshape(runs, first.in_features, first.out_features)

    def _product(self, x: Tensor, weights_RIO: Tensor, biases_RO: Tensor | None = None) -> Tensor:
        x_RTI, weights_RIO = in_autocast(x.flatten(1, -2)), in_autocast(weights_RIO)
        if biases_RO is not None:
            y_RTO = torch.baddbmm(in_autocast(biases_RO).unsqueeze(1), x_RTI, weights_RIO)
        else:
            y_RTO = torch.bmm(x_RTI, weights_RIO)
        self._watch(x_RTI, y_RTO)
        return y_RTO.view(*x.shape[:-1], -1)

    def _watch(self, x_RTI: Tensor, y_RTO: Tensor) -> None:
        """Answer the probes that are open now in the backward pass."""
        keys = {run: key for run, key in enumerate(self._keys) if open_probe(key) is not None}
        if not keys:
            return
        for key in keys.values():
            note_forward(key, trains=True)
        x_RTI = x_RTI.detach()

        def answer(dy_RTO: Tensor) -> None:
            for run, key in keys.items():
                if (probe := open_probe(key)) is not None:
                    topology = self._layers[run].topology
                    layout = Layout(topology.shape, topology.unit, topology.indices)
                    probe.add(BACKENDS["reference"], layout, dy_RTO[run], x_RTI[run])

        y_RTO.register_hook(answer)


def _place(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
