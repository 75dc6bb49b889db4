"""Groups of units of a layer, each with a least and a most number of active ones.

A partition cuts the grid of a layer's units into equal tiles: the whole layer, the slices of attention heads, rows (the
fan-in of a neuron, or of a block of neurons), columns (the fan-out), or a few consecutive inputs of a row, of which a
quota says how many are active. Whatever moves connections keeps every group inside its limits; a group that is outside
them already may come nearer, and goes no farther.

Needs no torch at import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from sparsae.config.unit import Quota
    from sparsae.core.heads import HeadLayout

TOLERANCE = 1e-9  # 0.1 * 30 is not 3 in floating point


@dataclass(frozen=True)
class Groups:
    """One partition of the units of a (rows, columns) grid into tiles, with the same limits for every tile.

    fan: "in" for rows and "out" for columns, whose limits are `share` of their mean; None for others.
    """

    grid: tuple[int, int]
    tile: tuple[int, int]
    least: int
    most: int
    fan: Literal["in", "out"] | None = None
    share: tuple[float, float] = (0.0, math.inf)

    @classmethod
    def of_layer(cls, grid: tuple[int, int], least: int, most: int) -> Groups:
        """The layer as one group."""
        return cls(grid, grid, least, most)

    @classmethod
    def of_heads(cls, grid: tuple[int, int], unit: tuple[int, int], heads: HeadLayout, least: int) -> Groups:
        """The slices of attention heads. ValueError where a unit crosses two of them."""
        block = unit[0] if heads.axis == "out" else unit[1]
        if heads.size % block:
            raise ValueError(f"units of {block} features cross heads of {heads.size}")
        width = heads.size // block
        tile = (width, grid[1]) if heads.axis == "out" else (grid[0], width)
        return cls(grid, tile, least, tile[0] * tile[1])

    @classmethod
    def of_neurons(
        cls, grid: tuple[int, int], fan: Literal["in", "out"], share: tuple[float, float], count: int
    ) -> Groups:
        """Rows (fan-in) or columns (fan-out): `share` of their mean with `count` active units, rounded outward."""
        tile = (1, grid[1]) if fan == "in" else (grid[0], 1)
        return cls(grid, tile, 0, tile[0] * tile[1], fan, share).at(count)

    @classmethod
    def of_quota(cls, grid: tuple[int, int], quota: Quota) -> Groups:
        """Every so many consecutive weights of a row, which the quota has to divide: exactly N of M are active."""
        return cls(grid, (1, quota.of), quota.active, quota.active)

    def at(self, count: int) -> Groups:
        """The same groups where the layer has so many active units."""
        if self.fan is None:
            return self
        mean = count / self.count
        least = math.floor(self.share[0] * mean + TOLERANCE)
        return replace(self, least=least, most=min(self.size, math.ceil(self.share[1] * mean - TOLERANCE)))

    @property
    def size(self) -> int:
        """Units of a group."""
        return self.tile[0] * self.tile[1]

    @property
    def count(self) -> int:
        """Groups."""
        return self.grid[0] * self.grid[1] // self.size

    @property
    def binds(self) -> bool:
        """Whether the limits exclude anything."""
        return self.least > 0 or self.most < self.size

    @property
    def is_quota(self) -> bool:
        """Whether every group has to keep one number of active units, whatever the layer has."""
        return self.fan is None and self.least == self.most

    def of(self, units: Tensor) -> Tensor:
        """(n,) int64: the group of each of the flat unit numbers (see topology.py), numbered down the columns."""
        units = units.long()
        row, column = units % self.grid[0] // self.tile[0], units // self.grid[0] // self.tile[1]
        return column * (self.grid[0] // self.tile[0]) + row

    def place(self, units: Tensor) -> Tensor:
        """(n,) int64: the numbers of the units where those of one group are numbered one after another."""
        units = units.long()
        row, column = units % self.grid[0] % self.tile[0], units // self.grid[0] % self.tile[1]
        return self.of(units) * self.size + column * self.tile[0] + row

    def units(self, places: Tensor) -> Tensor:
        """(n,) int64: the units that have these numbers by `place`."""
        group, inside = places // self.size, places % self.size
        bands = self.grid[0] // self.tile[0]
        row = group % bands * self.tile[0] + inside % self.tile[0]
        return (group // bands * self.tile[1] + inside // self.tile[0]) * self.grid[0] + row

    def counts(self, units: Tensor) -> Tensor:
        """(count,) int64: how many of the units are in each group."""
        of_each = self.of(units)
        return of_each.new_zeros(self.count).index_add_(0, of_each, of_each.new_ones(()).expand_as(of_each))

    def consists_of(self, other: Groups) -> bool:
        """Whether every group here is some whole groups of the other partition."""
        return not any(mine % theirs for mine, theirs in zip(self.tile, other.tile, strict=True))

    def follows_from(self, other: Groups) -> bool:
        """Whether the limits here hold wherever those of the other partition do."""
        times = self.size // other.size
        within = self.least <= times * other.least and times * other.most <= self.most
        return self.consists_of(other) and within


def binding(partitions: Iterable[Groups]) -> list[Groups]:
    """The partitions that exclude something which no other one does, those with the least freedom first."""
    found: list[Groups] = []
    for groups in partitions:
        if groups.binds and not any(groups.follows_from(other) for other in found):
            found = [other for other in found if not other.follows_from(groups)] + [groups]
    return sorted(found, key=lambda groups: (groups.most - groups.least) / groups.size)
