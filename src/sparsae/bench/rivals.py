"""Other libraries' sparse layers, built from the same topology and values as ours: one adapter each.

None of them is a dependency. What is not installed is named and left out.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.bench.clock import CPU
from sparsae.core.topology import Topology
from sparsae.nn.linear import SparseLinear


class Rival(ABC):
    """A sparse layer that is not ours.

    devices: those that it computes on. trains: whether it has a backward pass. blocks: blocks, or single weights.
    module and install: what it is imported from, and what installs that without touching torch; None for what torch
    has.
    """

    name: str
    devices: tuple[str, ...] = ("cpu",)
    trains: bool = True
    blocks: bool = False
    module: str | None = None
    install: str | None = None
    # The only one that it has, where it chooses its units itself.
    sparsity: float | None = None

    def absence(self, device: torch.device = CPU) -> str | None:
        """Why it is not here, for layers on this device; None where it is."""
        if device.type not in self.devices:
            return f"it computes on {' and '.join(self.devices)}, not on {device.type}"
        try:
            import_module(self.module or "torch")
        except ModuleNotFoundError as error:
            if self.module is not None and error.name == self.module.partition(".")[0]:
                return f"not installed ({self.install})"
            return f"not usable: it needs {error.name}"
        except ImportError as error:
            return f"not usable: {error}"
        return None

    def refusal(self, unit: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot serve such a layer; None where it can."""
        if dtype != torch.float32 and device.type == "cpu":
            return "it computes in float32"
        if (unit != (1, 1)) != self.blocks:
            return "it computes blocks" if self.blocks else "it computes single weights"
        return None

    @abstractmethod
    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        """(tokens, in) to (tokens, out), with those weights."""


class SparseLab(Rival):
    """SparseLab 0.2: rows with room to grow (padded CSR), its own kernels."""

    name = "sparselab"
    module = "sparselab"
    install = "pip install --no-deps sparselab==0.2.2"

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        sparselab = import_module("sparselab")
        with _quiet():
            layer: Any = sparselab.SparseLinear(topology.shape[1], topology.shape[0], sparsity=1 - topology.density)
            # Its constructor draws a topology of its own; the parameter is a view of the structure's values.
            layer._csr = sparselab.PaddedCSR.from_dense(_weight(topology, values))
        layer._values = nn.Parameter(torch.from_numpy(layer._csr.values))
        layer.bias = nn.Parameter(bias_O.clone())
        return layer


class SparseProp(Rival):
    """SparseProp (Nikdan et al., 2023): CSR, vectorized over the batch."""

    name = "sparseprop"
    module = "sparseprop.modules"
    install = "pip install pybind11 scipy setuptools wheel && pip install --no-deps --no-build-isolation sparseprop"

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        modules = import_module("sparseprop.modules")
        return modules.SparseLinear(_weight(topology, values), nn.Parameter(bias_O.clone()))


class TorchCsr(Rival):
    """torch.sparse in CSR. `torch.sparse.addmm` is the product whose gradient stays sparse; F.linear's is dense."""

    name = "torch-csr"
    devices = ("cpu", "cuda")

    def absence(self, device: torch.device = CPU) -> str | None:
        return super().absence(device) or _without_mkl(device)

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        with _quiet():
            return _Csr(_weight(topology, values).to_sparse_csr(), bias_O)


class TorchBsr(Rival):
    """torch.sparse in BSR: torch 2.13 has its forward pass, on CUDA by Triton kernels, and no backward pass."""

    name = "torch-bsr"
    devices = ("cpu", "cuda")
    trains = False
    blocks = True

    def absence(self, device: torch.device = CPU) -> str | None:
        return super().absence(device) or _without_mkl(device)

    def refusal(self, unit: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super().refusal(unit, dtype, device)
        if reason is None and device.type == "cuda" and min(unit) < 16:
            return "its kernels want blocks from 16 on"
        return reason

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        with _quiet():
            return _Product(_weight(topology, values).to_sparse_bsr(topology.unit), bias_O)


class Blksprs(Rival):
    """blksprs 2.5: products of block-sparse matrices, in Triton.

    In a layer only the weight is sparse: inputs and outputs are cut into blocks, and put together again.
    """

    name = "blksprs"
    devices = ("cuda",)
    blocks = True
    module = "blksprs"
    install = "pip install --no-deps blksprs==2.5"

    def refusal(self, unit: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super().refusal(unit, dtype, device)
        if reason is None and (unit[0] != unit[1] or unit[0] < 16 or unit[0] & (unit[0] - 1)):
            return "it wants square blocks of 16, 32, 64, ..."
        return reason

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        return BlockProduct(topology, values, bias_O)


class TorchSemi(Rival):
    """torch's 2:4 sparsity (cuSPARSELt or CUTLASS): two weights of each four in a row, in half precision, forward only.

    It cannot have the topology of the others: it stands beside them at a sparsity of 0.5, with units of its own.
    """

    name = "torch-2:4"
    devices = ("cuda",)
    trains = False
    sparsity = 0.5

    def absence(self, device: torch.device = CPU) -> str | None:
        reason = super().absence(device)
        if reason is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "not usable: it wants compute capability 8.0"
        return reason

    def refusal(self, unit: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16):
            return "it computes in float16 and bfloat16"
        return super().refusal(unit, dtype, device)

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        weight_OI = torch.randn(topology.shape, dtype=values.dtype, device=values.device)
        weight_OI.view(-1, 4)[:, 2:] = 0
        with _quiet():
            return _Product(torch.sparse.to_sparse_semi_structured(weight_OI), bias_O)


class _Csr(nn.Module):
    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_OI), nn.Parameter(bias_O.clone())

    def forward(self, x_TI: Tensor) -> Tensor:
        return torch.sparse.addmm(self.bias[:, None].expand(-1, x_TI.shape[0]), self.weight, x_TI.T).T


class BlockProduct(nn.Module):
    """Y = X W^T + b by blksprs, whose blocks of W^T go by rows, as those of a topology do."""

    def __init__(self, topology: Topology, values: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        library = import_module("blksprs")
        library.utils.disable_validation()  # which waits for the GPU several times a product
        self._ops, self._side = library.ops, topology.unit[0]
        rows, columns = topology.grid
        layout = torch.zeros(columns * rows, dtype=torch.bool, device=values.device)
        layout.index_fill_(0, topology.indices.long(), True)
        self._layout_IO = layout.view(1, columns, rows)
        self._kept: dict[int, tuple[Tensor, Tensor, list[dict[str, Any]]]] = {}
        self.weight = nn.Parameter(values.transpose(1, 2).contiguous())
        self.bias = nn.Parameter(bias_O.clone())

    def forward(self, x_TI: Tensor) -> Tensor:
        """x: (tokens, in). Raises NotImplementedError for tokens that do not fill whole blocks."""
        ops, side = self._ops, self._side
        count, rest = divmod(x_TI.shape[0], side)
        if rest:
            raise NotImplementedError(f"it wants tokens in whole blocks, not {x_TI.shape[0]} in blocks of {side}")
        if count not in self._kept:
            full_TI, full_TO = (self._layout_IO.new_ones(1, count, n) for n in self._layout_IO.shape[1:])
            self._kept[count] = full_TI, full_TO, [{}, {}, {}]
        full_TI, full_TO, (into, product, back) = self._kept[count]
        x = ops.to_sparse_row_striped(x_TI.unsqueeze(0), full_TI, side, layout_cache=into)
        y = ops.matmul(x, full_TI, self.weight, self._layout_IO, full_TO, side, layout_cache=product)
        y_TO: Tensor = ops.to_dense_row_striped(y, full_TO, side, layout_cache=back).squeeze(0)
        return y_TO + self.bias


class _Product(nn.Module):
    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        return nn.functional.linear(x_TI, self.weight, self.bias)


RIVALS: dict[str, Rival] = {
    rival.name: rival for rival in (SparseLab(), SparseProp(), TorchCsr(), TorchBsr(), Blksprs(), TorchSemi())
}


def _weight(topology: Topology, values: Tensor) -> Tensor:
    # A value of exactly zero would not be stored by those who start from a dense matrix.
    stored = torch.where(values == 0, torch.finfo(values.dtype).tiny, values)
    return SparseLinear(topology, stored).dense_weight().detach()


def _without_mkl(device: torch.device) -> str | None:
    if device.type != "cpu":
        return None
    return None if torch.backends.mkl.is_available() else "not usable: torch computes it with MKL, which this one lacks"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch says at the first such tensor that its sparse layouts are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
