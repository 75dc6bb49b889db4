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

from sparsae.core.topology import Topology
from sparsae.nn.linear import SparseLinear


class Rival(ABC):
    """A sparse layer that is not ours.

    trains: whether it has a backward pass. blocks: blocks, or single weights. module and install: what it is imported
    from, and what installs that without touching torch; None for what torch has.
    """

    name: str
    trains: bool = True
    blocks: bool = False
    module: str | None = None
    install: str | None = None

    def absence(self) -> str | None:
        """Why it is not here; None where it is."""
        try:
            import_module(self.module or "torch")
        except ModuleNotFoundError as error:
            if self.module is not None and error.name == self.module.partition(".")[0]:
                return f"not installed ({self.install})"
            return f"not usable: it needs {error.name}"
        except ImportError as error:
            return f"not usable: {error}"
        return None

    def refusal(self, unit: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why it cannot serve such a layer; None where it can."""
        if dtype != torch.float32:
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

    def absence(self) -> str | None:
        return _without_mkl()

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        with _quiet():
            return _Csr(_weight(topology, values).to_sparse_csr(), bias_O)


class TorchBsr(Rival):
    """torch.sparse in BSR: torch 2.13 has its forward pass on a CPU, and no backward pass."""

    name = "torch-bsr"
    trains = False
    blocks = True

    def absence(self) -> str | None:
        return _without_mkl()

    def layer(self, topology: Topology, values: Tensor, bias_O: Tensor) -> nn.Module:
        with _quiet():
            return _Bsr(_weight(topology, values).to_sparse_bsr(topology.unit), bias_O)


class _Csr(nn.Module):
    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_OI), nn.Parameter(bias_O.clone())

    def forward(self, x_TI: Tensor) -> Tensor:
        return torch.sparse.addmm(self.bias[:, None].expand(-1, x_TI.shape[0]), self.weight, x_TI.T).T


class _Bsr(nn.Module):
    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        return nn.functional.linear(x_TI, self.weight, self.bias)


RIVALS: dict[str, Rival] = {rival.name: rival for rival in (SparseLab(), SparseProp(), TorchCsr(), TorchBsr())}


def _weight(topology: Topology, values: Tensor) -> Tensor:
    # A value of exactly zero would not be stored by those who start from a dense matrix.
    stored = torch.where(values == 0, torch.finfo(values.dtype).tiny, values)
    return SparseLinear(topology, stored).dense_weight().detach()


def _without_mkl() -> str | None:
    return None if torch.backends.mkl.is_available() else "not usable: torch computes it with MKL, which this one lacks"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch says at the first such tensor that its sparse layouts are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
