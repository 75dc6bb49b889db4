"""Which connections of a weight exist.

A weight of shape (out, in) is cut into a grid of *units*: single weights, or b_out x b_in blocks. A `Topology` is the
sorted set of the units that are active. Units are numbered down the columns of the grid, flat = column * grid_rows +
row, so that the values of one input feature lie together (the order in which a backward pass produces their
gradients).

Nothing here ever builds anything of the size of the grid, but for `to_mask`, which is for people and tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparsae.core.host import on_device
from sparsae.core.ranking import positions, search


@dataclass(frozen=True, eq=False)
class Topology:
    """The active units of a weight.

    shape: (out, in) of the weight, in features. unit: (b_out, b_in). indices: (count,) sorted, unique flat unit
    numbers, int32 where they fit, else int64, never written. The constructor trusts its arguments; `from_indices`
    checks them, and copies.
    """

    shape: tuple[int, int]
    indices: Tensor
    unit: tuple[int, int] = (1, 1)
    _views: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_indices(cls, shape: tuple[int, int], indices: Tensor, unit: tuple[int, int] = (1, 1)) -> Topology:
        """A checked topology from flat unit numbers in any order.

        Raises ValueError where the unit does not divide the shape, or where an index is out of range or repeated.
        """
        units = grid_size(shape, unit)
        ordered = indices.to(torch.int64).sort().values
        if ordered.numel() and (int(ordered[0]) < 0 or int(ordered[-1]) >= units):
            raise ValueError(f"unit indices must lie in [0, {units}), got [{int(ordered[0])}, {int(ordered[-1])}]")
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError("unit indices must be unique")
        return cls(shape, ordered.to(index_dtype(units)), unit)

    @classmethod
    def random(
        cls, shape: tuple[int, int], count: int, rng: torch.Generator, unit: tuple[int, int] = (1, 1)
    ) -> Topology:
        """`count` units drawn uniformly without replacement."""
        units = grid_size(shape, unit)
        return cls(shape, sample_distinct(units, count, rng).to(index_dtype(units)), unit)

    def __deepcopy__(self, memo: dict[int, object]) -> Topology:
        # Nobody changes it, so everybody may share it.
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of units."""
        return self.shape[0] // self.unit[0], self.shape[1] // self.unit[1]

    @property
    def units(self) -> int:
        """Units of the whole grid, active or not."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """Active units."""
        return self.indices.numel()

    @property
    def nnz(self) -> int:
        """Active weights."""
        return self.count * self.unit[0] * self.unit[1]

    @property
    def density(self) -> float:
        """Share of the weights that are active."""
        return self.count / self.units

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values of the active units: (nnz,) or (count, b_out, b_in)."""
        return (self.count,) if self.unit == (1, 1) else (self.count, *self.unit)

    @property
    def rows(self) -> Tensor:
        """(count,) grid row of each active unit."""
        return self.indices % self.grid[0]

    @property
    def columns(self) -> Tensor:
        """(count,) grid column of each active unit."""
        return self.indices // self.grid[0]

    def view(self, name: str, make: Callable[[Topology], list[Tensor]]) -> list[Tensor]:
        """Index structures that a kernel wants, made once, shared by layers with this topology, gone with it."""
        if name not in self._views:
            # Whoever asks first may be in inference mode, whose tensors are of no use for training.
            with torch.inference_mode(False), torch.no_grad():
                self._views[name] = make(self)
        return self._views[name]

    def positions(self, units: Tensor) -> Tensor:
        """Where the given active units stand in `indices`; ValueError for a unit that is not active."""
        found = search(self.indices, self._narrow(units))
        if units.numel() and not (self.count and (self.indices[found.clamp(max=self.count - 1)] == units).all()):
            raise ValueError("not every given unit is active")
        return found

    def contains(self, units: Tensor) -> Tensor:
        """(n,) bool: which of the given flat unit numbers are active."""
        if not self.count:
            return torch.zeros_like(units, dtype=torch.bool)
        found = search(self.indices, self._narrow(units)).clamp_(max=self.count - 1)
        return self.indices[found] == units

    def _narrow(self, units: Tensor) -> Tensor:
        """Numbers of units in the type of `indices`; of what is no unit's number, that of one."""
        return units.long().clamp(0, max(0, self.units - 1)).to(self.indices.dtype)

    def sample_inactive(self, n: int, rng: torch.Generator) -> Tensor:
        """n inactive units, drawn uniformly without replacement, sorted.

        The r-th inactive unit is r plus the number of active units before it, which a search in (indices - rank) gives:
        O((nnz + n) log) and no more memory. Raises ValueError where fewer than n are inactive.
        """
        return self.inactive_at(sample_distinct(self.units - self.count, n, rng))

    def inactive_at(self, ranks: Tensor) -> Tensor:
        """The inactive units of the given ranks among all inactive ones."""
        ranks = on_device(ranks.long(), self.indices.device)
        gaps = self.indices.to(torch.int64) - torch.arange(self.count, device=self.indices.device)
        return (ranks + search(gaps, ranks, right=True)).to(self.indices.dtype)

    def replace(self, drop: Tensor, grow: Tensor) -> tuple[Topology, Tensor]:
        """Without the active units `drop` and with the inactive units `grow`.

        Returns the new topology and, for each of its units, the position of the same unit in this one, or -1 for a
        grown unit: (count,) int64. Raises ValueError where a dropped unit is not active, a grown one is, or one is
        repeated or outside the layer, or units are no whole numbers.
        """
        replacement = self.replacement(drop, grow)
        replacement.check(replacement.wrong.tolist())
        return replacement.made()

    def replacement(self, drop: Tensor, grow: Tensor) -> Replacement:
        """As `replace`, of which nothing is checked or made yet, so that no device is waited for.

        Raises ValueError only where units are no whole numbers, or more are dropped than are active.
        """
        if any(units.dtype not in (torch.int32, torch.int64) for units in (drop, grow)):
            raise ValueError("unit numbers must be int32 or int64")
        if drop.numel() > self.count:
            raise ValueError(_WRONG[2])
        drop, grow = on_device(drop, self.indices.device), on_device(grow, self.indices.device)
        outside = [((units < 0) | (units >= self.units)).any() for units in (drop, grow)]
        # Searching for sorted units walks through memory, for others it jumps: sorting first is several times faster.
        drop, grow = (units.to(self.indices.dtype).sort().values for units in (drop, grow))
        last = max(self.count - 1, 0)
        before, at_drop = search(self.indices, grow), search(self.indices, drop)
        at_drop.clamp_(max=last)
        if self.count:
            taken = (self.indices[before.clamp(max=last)] == grow).any()
            absent = outside[0] | (self.indices[at_drop] != drop).any()
        else:
            taken = absent = torch.zeros_like(outside[0])
        twice = [(units[1:] == units[:-1]).any() for units in (drop, grow)]
        wrong = torch.stack([outside[1], taken, absent, *twice])
        return Replacement(self, grow, before, at_drop, wrong)

    def to(self, device: torch.device | str) -> Topology:
        """The same topology with its indices on another device."""
        return Topology(self.shape, self.indices.to(device), self.unit)

    def to_mask(self) -> Tensor:
        """The (out, in) boolean mask: for people and tests."""
        rows, columns = self.grid
        mask = torch.zeros(rows * columns, dtype=torch.bool, device=self.indices.device)
        mask[self.indices.long()] = True
        mask = mask.view(columns, rows).T
        return mask.repeat_interleave(self.unit[0], 0).repeat_interleave(self.unit[1], 1)


_WRONG = (
    "a grown unit is outside the layer, which has {units}",
    "a grown unit is already active",
    "not every given unit is active",
    "a dropped unit is given twice",
    "a grown unit is given twice",
)


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a topology shall become.

    grow: sorted. before: how many active units are below each grown one. at_drop: where the dropped ones stand. wrong:
    (5,) bool on the topology's device, what is wrong with them.
    """

    topology: Topology
    grow: Tensor
    before: Tensor
    at_drop: Tensor
    wrong: Tensor

    def check(self, wrong: Sequence[bool]) -> None:
        """Raise ValueError for the first that is wrong. wrong: as the attribute has it, from wherever it is asked."""
        for is_so, what in zip(wrong, _WRONG, strict=True):
            if is_so:
                raise ValueError(what.format(units=self.topology.units))

    def made(self) -> tuple[Topology, Tensor]:
        """What `Topology.replace` returns, of units with which nothing is wrong."""
        old, grow = self.topology, self.grow
        keep = torch.ones(old.count, dtype=torch.bool, device=grow.device).index_fill_(0, self.at_drop, False)
        kept_at = positions(keep, old.count - self.at_drop.numel())
        # A grown unit stands where as many kept and grown ones are before it; the kept ones fill the other places.
        at_grown = self.before - search(self.at_drop, self.before)
        at_grown += torch.arange(grow.numel(), device=grow.device)
        is_kept = torch.ones(kept_at.numel() + grow.numel(), dtype=torch.bool, device=grow.device)
        is_kept.index_fill_(0, at_grown, False)
        source = torch.full((is_kept.numel(),), -1, dtype=torch.int64, device=grow.device)
        source.masked_scatter_(is_kept, kept_at)
        indices = torch.empty(is_kept.numel(), dtype=old.indices.dtype, device=grow.device)
        indices.masked_scatter_(is_kept, old.indices.index_select(0, kept_at)).index_copy_(0, at_grown, grow)
        return Topology(old.shape, indices, old.unit), source


def grid_size(shape: tuple[int, int], unit: tuple[int, int]) -> int:
    """Units of a weight; ValueError where the unit does not divide the shape."""
    if shape[0] % unit[0] or shape[1] % unit[1]:
        raise ValueError(f"a unit of {unit[0]}x{unit[1]} does not divide a weight of {shape[0]}x{shape[1]}")
    return (shape[0] // unit[0]) * (shape[1] // unit[1])


def index_dtype(units: int) -> torch.dtype:
    """int32 where every unit number of the grid fits, else int64."""
    return torch.int32 if units <= 2**31 - 1 else torch.int64


def sample_distinct(population: int, n: int, rng: torch.Generator) -> Tensor:
    """n distinct numbers of [0, population), uniform over all such sets, sorted: (n,) int64 on the CPU.

    Draws are repeated until n distinct ones are there and surplus ones are removed at random, so time and memory are
    O(n) however large the population is. Raises ValueError for n > population.
    """
    if not 0 <= n <= population:
        raise ValueError(f"cannot draw {n} distinct units of {population}")
    if 4 * n >= population:
        return torch.randperm(population, generator=rng, device="cpu")[:n].sort().values
    drawn = _sample_by_mark(population, n, rng) if population <= _MARKED * n else _sample_by_sort(population, n, rng)
    surplus = drawn.numel() - n
    if surplus:
        keep = torch.ones(drawn.numel(), dtype=torch.bool, device="cpu")
        keep.index_fill_(0, sample_distinct(drawn.numel(), surplus, rng), False)
        drawn = drawn.index_select(0, positions(keep, n))
    return drawn


# Bytes of marks a wanted number up to which marking what was drawn takes less time than sorting it.
_MARKED = 32


def _sample_by_mark(population: int, n: int, rng: torch.Generator) -> Tensor:
    """At least n distinct numbers of [0, population), sorted."""
    marked, found = torch.zeros(population, dtype=torch.bool, device="cpu"), 0
    while found < n:
        marked.index_fill_(0, _more(population, n, found, rng), True)
        found = int(np.count_nonzero(marked.numpy()))
    return positions(marked, found)


def _sample_by_sort(population: int, n: int, rng: torch.Generator) -> Tensor:
    """The same numbers as `_sample_by_mark`, without memory for the population."""
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < n:
        more = _more(population, n, drawn.numel(), rng)
        # Sorting takes most of the time, and half of it on numbers of half the size.
        drawn = torch.cat([drawn, more]).to(index_dtype(population)).sort().values.long()
        drawn = drawn[torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), drawn[1:] != drawn[:-1]])]
    return drawn


def _more(population: int, n: int, found: int, rng: torch.Generator) -> Tensor:
    return torch.randint(population, (n - found + n // 4 + 8,), generator=rng, device="cpu")


def remap(tensor: Tensor, source: Tensor) -> Tensor:
    """A tensor over old units carried to new ones: `source` is each new unit's old position, -1 gives zeros."""
    if not tensor.shape[0]:
        return tensor.new_zeros(source.numel(), *tensor.shape[1:])
    carried = tensor.index_select(0, source.clamp(min=0))
    return carried.masked_fill_((source < 0).view(-1, *[1] * (carried.dim() - 1)), 0)


def digest(*indices: Tensor) -> bytes:
    """8 bytes that no other indices have."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in indices:
        found.update(tensor.cpu().numpy().tobytes())
    return found.digest()
