"""The first topology of a layer: random, within what is asked of its attention heads and neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sparsae.config.section import check_share_of_mean
from sparsae.core.drawing import evened
from sparsae.core.groups import Groups
from sparsae.core.heads import HeadLayout
from sparsae.core.topology import Topology, grid_size, index_dtype, sample_distinct
from sparsae.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What is asked of the parts of every layer: see `sparsify`. Raises InputError for fans that are none."""

    head_min_density: float = 0.0
    fan_in: tuple[float, float] | None = None
    fan_out: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, share in (("fan_in", self.fan_in), ("fan_out", self.fan_out)):
            try:
                check_share_of_mean((0.0, 1.0) if share is None else share)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None

    def heads(
        self, shape: tuple[int, int], unit: tuple[int, int], count: int, layout: HeadLayout | None
    ) -> Groups | None:
        """The attention heads of a layer with `count` active units, where they have a floor.

        Raises InputError where blocks cross heads, and where `count` cannot hold all floors.
        """
        if layout is None or self.head_min_density == 0.0:
            return None
        block = unit[0] if layout.axis == "out" else unit[1]
        if layout.size % block:
            raise InputError(
                f"a block of {block} features crosses attention heads of {layout.size}: sparsity.unit must divide them"
            )
        floor = math.ceil(self.head_min_density * grid_size(shape, unit) / layout.groups(*shape))
        groups = Groups.of_heads((shape[0] // unit[0], shape[1] // unit[1]), unit, layout, floor)
        if floor * groups.count > count:
            raise InputError(
                f"head_min_density {self.head_min_density:g} needs {floor * groups.count} units where the layer has "
                f"{count}: lower it"
            )
        return groups

    def groups(
        self, shape: tuple[int, int], unit: tuple[int, int], count: int, layout: HeadLayout | None
    ) -> tuple[Groups, ...]:
        """All that have limits of a layer with `count` active units. Raises InputError as `heads` does."""
        grid = shape[0] // unit[0], shape[1] // unit[1]
        found = [self.heads(shape, unit, count, layout)]
        found += [Groups.of_neurons(grid, fan, share, count) for fan, share in self._fans()]
        return tuple(groups for groups in found if groups is not None)

    def neurons(
        self, shape: tuple[int, int], unit: tuple[int, int], count: int, layout: HeadLayout | None
    ) -> dict[Literal["in", "out"], Groups]:
        """Rows ("in") and columns ("out") of a new layer, which see to the floors of heads that consist of them.

        Raises InputError as `heads` does, and where a head's floor asks more of its neurons than the mean of all.
        """
        heads, found = self.heads(shape, unit, count, layout), {}
        for fan, share in self._fans():
            groups = Groups.of_neurons((shape[0] // unit[0], shape[1] // unit[1]), fan, share, count)
            least = groups.least
            if heads is not None and heads.consists_of(groups):
                least = max(least, math.ceil(heads.least * groups.size / heads.size))
            if least * groups.count > count:
                raise InputError(
                    f"head_min_density {self.head_min_density:g} needs {least} units of every neuron, more than the "
                    f"mean of fan_{fan}, which is {count / groups.count:.4g}: lower it"
                )
            found[fan] = replace(groups, least=least)
        return found

    def first_topology(
        self,
        shape: tuple[int, int],
        unit: tuple[int, int],
        count: int,
        layout: HeadLayout | None,
        rng: torch.Generator,
    ) -> Topology:
        """`count` random units; where heads have a floor, each gets its floor first and the rest falls anywhere.

        Of neurons that got too many or too few, random units move (see `evened`). Raises InputError as `neurons` does.
        """
        heads = self.heads(shape, unit, count, layout)
        topology = (
            Topology.random(shape, count, rng, unit) if heads is None else _above_floors(shape, unit, count, heads, rng)
        )
        for fan, groups in self.neurons(shape, unit, count, layout).items():
            topology = evened(topology, fan, groups.least, groups.most, rng)
        return topology

    def _fans(self) -> list[tuple[Literal["in", "out"], tuple[float, float]]]:
        fans: list[tuple[Literal["in", "out"], tuple[float, float] | None]] = [
            ("in", self.fan_in),
            ("out", self.fan_out),
        ]
        return [(fan, share) for fan, share in fans if share is not None]


def _above_floors(
    shape: tuple[int, int], unit: tuple[int, int], count: int, heads: Groups, rng: torch.Generator
) -> Topology:
    places = [sample_distinct(heads.size, heads.least, rng) + head * heads.size for head in range(heads.count)]
    units = heads.units(torch.cat(places)).sort().values
    floors = Topology(shape, units.to(index_dtype(heads.grid[0] * heads.grid[1])), unit)
    return floors.replace(floors.indices[:0], floors.sample_inactive(count - floors.count, rng))[0]
