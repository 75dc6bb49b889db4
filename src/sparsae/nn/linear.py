"""A linear layer that owns an index set and a vector of values, and nothing of the size of a dense weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout
from sparsae.kernels.function import sparse_linear
from sparsae.kernels.registry import BACKENDS, choose_backend


class SparseLinear(nn.Module):
    """y = x W^T + b with W zero outside a topology: takes and returns what `nn.Linear` does.

    values: parameter of shape (nnz,), or (count, b_out, b_in) for blocks, in the order of `topology.indices`. bias:
    (out,) or None. Under autocast the product is computed in the autocast dtype. `conv1d` remembers that the layer
    stands for a transformers `Conv1D`, whose dense weight is (in, out).
    """

    indices: Tensor
    _topology: Topology

    def __init__(
        self,
        topology: Topology,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        backend: str = "auto",
        conv1d: bool = False,
    ) -> None:
        """Raises ValueError where values or bias do not have the topology's shape."""
        super().__init__()
        if bias is not None and tuple(bias.shape) != topology.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, not ({topology.shape[0]},)")
        self.out_features, self.in_features = topology.shape
        self.unit = topology.unit
        self.backend = backend
        self.conv1d = conv1d
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("indices", topology.indices)
        self._derived: list[Tensor] | None = None
        self._kernel: str | None = None
        self.set_topology(topology, values)

    @property
    def topology(self) -> Topology:
        """The active units, on the device of the values."""
        if self._topology.indices is not self.indices:
            self._topology = Topology((self.out_features, self.in_features), self.indices, self.unit)
        return self._topology

    @property
    def kernel(self) -> str:
        """The name of the backend that serves this layer."""
        if self._kernel is None:
            self.choose_kernel()
        assert self._kernel is not None
        return self._kernel

    @property
    def layout(self) -> Layout:
        """The active units as the backend gets them."""
        return Layout((self.out_features, self.in_features), self.unit, self.indices, self.derived_indices)

    @property
    def derived_indices(self) -> list[Tensor]:
        """What the backend keeps beside the topology's own indices."""
        return self._derived or []

    def set_topology(self, topology: Topology, values: Tensor) -> None:
        """Take over a topology and its values, keeping the parameter object and dropping its gradient.

        For `surgery` and for loading only: optimizer state and teacher do not follow by themselves.
        """
        if tuple(values.shape) != topology.values_shape:
            raise ValueError(f"values have shape {tuple(values.shape)}, the topology wants {topology.values_shape}")
        self.values.grad = None
        if values.shape != self.values.shape:
            # A graph that is still referenced keeps the parameter's gradient accumulator, which remembers the old
            # shape; a passing change of dtype makes autograd forget it.
            other = torch.float64 if values.dtype != torch.float64 else torch.float32
            self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values
        self.indices = topology.indices
        self._topology = topology
        chosen = self._kernel is not None
        self._derived = self._kernel = None
        if chosen:
            # Compiled code reads what was chosen and must never find that it has to choose.
            self.choose_kernel()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        if self._derived is None or self._kernel is None:
            self.choose_kernel()
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, values = x.to(dtype), values.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled() and type(x) is Tensor and not torch.compiler.is_compiling():
            # What nobody differentiates or traces needs no operator, which would cost a third of decoding a token.
            y_TO = BACKENDS[self.kernel].spmm(values, self.layout, x.reshape(-1, self.in_features), bias)
            return y_TO.view(*x.shape[:-1], self.out_features)
        return sparse_linear(
            x, values, bias, self.indices, self._derived, self.out_features, self.in_features, self._kernel
        )

    def dense_weight(self) -> Tensor:
        """The (out, in) weight with its zeros, a new tensor: for export, people and tests."""
        weight = self.values.new_zeros(self.out_features, self.in_features)
        self.add_to_dense(weight, 1.0)
        return weight

    @torch.no_grad()
    def add_to_dense(self, weight_OI: Tensor, scale: float) -> None:
        """Add the values, times `scale`, to their places in a dense (out, in) matrix of any strides, in O(nnz)."""
        topology, (b_out, b_in) = self.topology, self.unit
        rows, columns = topology.grid
        blocks = weight_OI.view(rows, b_out, columns, b_in).transpose(1, 2)
        values = (self.values.detach() * scale).view(-1, b_out, b_in)
        blocks.index_put_((topology.rows.long(), topology.columns.long()), values, accumulate=True)

    def extra_repr(self) -> str:
        topology = self.topology
        unit = "" if self.unit == (1, 1) else f", unit={self.unit[0]}x{self.unit[1]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={topology.nnz}, "
            f"density={topology.density:.4g}{unit}, bias={self.bias is not None}"
        )

    def choose_kernel(self) -> None:
        """Choose the backend and make its index structures, which the first forward pass does otherwise.

        Raises InputError for a backend that does not exist or refuses this layer.
        """
        topology = self.topology
        layout = Layout(topology.shape, topology.unit, topology.indices)
        backend = choose_backend(self.backend, layout, self.values.dtype)
        self._derived = topology.view(backend.name, backend.derive)
        self._kernel = backend.name

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self._derived = self._kernel = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        indices, values = state_dict.get(prefix + "indices"), state_dict.get(prefix + "values")
        if indices is not None and values is not None:
            topology = Topology.from_indices((self.out_features, self.in_features), indices, self.unit)
            if not torch.equal(topology.indices, indices.to(topology.indices.dtype)):
                raise ValueError(f"{prefix}indices are not sorted: they are not what a SparseLinear saved")
            device = self.values.device
            self.set_topology(topology.to(device), torch.empty_like(values, device=device, dtype=self.values.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
