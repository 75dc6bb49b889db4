"""Sets of a grid's units that grow: one bit a position, or, where connections are very few, a sorted list."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparsae.core.topology import Topology

# Bits are what takes less memory up to so many positions for each of the first units.
_POSITIONS = 256


class UnitSet(ABC):
    """Units of a grid, where the topology is; `tensor` holds them."""

    tensor: Tensor

    @abstractmethod
    def contains(self, units: Tensor) -> Tensor:
        """(n,) bool: which of these flat unit numbers are in it."""

    @abstractmethod
    def add(self, units: Tensor) -> Tensor:
        """Take in these units, each given once; () int64: how many were not in it."""

    @abstractmethod
    def count(self) -> Tensor:
        """() int64: how many are in it."""


class Bits(UnitSet):
    """An eighth of a byte a position; nothing here waits for a device."""

    def __init__(self, tensor: Tensor) -> None:
        """tensor: (ceil(units / 8),) uint8, the first unit lowest in the first one."""
        self.tensor = tensor

    def contains(self, units: Tensor) -> Tensor:
        return (self.tensor.index_select(0, units >> 3) >> (units & 7).to(torch.uint8)) & 1 != 0

    def add(self, units: Tensor) -> Tensor:
        new = ~self.contains(units)
        # None of these bits is set, and none is given twice: their sum is their union.
        self.tensor.index_add_(0, units >> 3, new.to(torch.uint8) << (units & 7).to(torch.uint8))
        return new.count_nonzero()

    def count(self) -> Tensor:
        return torch.stack([(self.tensor & 1 << bit).count_nonzero() for bit in range(8)]).sum()


class Listed(UnitSet):
    """Four bytes (eight in a large grid) a unit that is in it; each `add` waits for a device."""

    def __init__(self, units: int, tensor: Tensor) -> None:
        """tensor: (n,) sorted unit numbers."""
        self._topology = Topology((units, 1), tensor)
        self.tensor = tensor

    def contains(self, units: Tensor) -> Tensor:
        return self._topology.contains(units)

    def add(self, units: Tensor) -> Tensor:
        new = units[~self.contains(units)]
        self._topology, _ = self._topology.replace(self.tensor[:0], new)
        self.tensor = self._topology.indices
        return torch.full((), new.numel(), dtype=torch.int64, device=units.device)

    def count(self) -> Tensor:
        return torch.full((), self.tensor.numel(), dtype=torch.int64, device=self.tensor.device)


def set_of(topology: Topology) -> UnitSet:
    """The active units, in the form that takes less memory as others come in."""
    indices = topology.indices
    if topology.units > _POSITIONS * topology.count:
        return Listed(topology.units, indices.clone())
    bits = Bits(torch.zeros(_bytes(topology.units), dtype=torch.uint8, device=indices.device))
    bits.add(indices)
    return bits


def restored(units: int, tensor: Tensor) -> UnitSet:
    """The set of a grid of so many units that a `tensor` holds. Raises ValueError for any other."""
    if tensor.dtype != torch.uint8:
        return Listed(units, tensor)
    if tensor.shape != (_bytes(units),):
        raise ValueError(f"{units} units are {_bytes(units)} bytes of bits, not {tensor.numel()}")
    return Bits(tensor)


def _bytes(units: int) -> int:
    return -(-units // 8)
