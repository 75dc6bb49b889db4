"""What is asked of the parts of a layer: of its attention heads and its neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsae.config.section import require_share_of_mean
from sparsae.config.unit import Quota
from sparsae.core.drawing import with_heads_floors
from sparsae.core.groups import Groups
from sparsae.core.heads import HeadLayout
from sparsae.core.topology import grid_size
from sparsae.errors import InputError, argument


@dataclass(frozen=True)
class Limits:
    """What is asked of the parts of every layer: see `sparsify`.

    Raises InputError for fans that are none, and for anything beside a quota.
    """

    head_min_density: float = 0.0
    fan_in: tuple[float, float] | None = None
    fan_out: tuple[float, float] | None = None
    quota: Quota | None = None

    def __post_init__(self) -> None:
        for name, share in (("fan_in", self.fan_in), ("fan_out", self.fan_out)):
            try:
                require_share_of_mean((0.0, 1.0) if share is None else share)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
        others = {"head_min_density": self.head_min_density, "fan_in": self.fan_in, "fan_out": self.fan_out}
        if self.quota is not None and (given := [name for name, value in others.items() if value]):
            raise InputError(f"unit {self.quota} fixes the connections of every neuron: leave out {', '.join(given)}")

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
                f"a block of {block} features crosses attention heads of {layout.size}: {argument('unit')} must divide "
                "them"
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
        if self.quota is not None:
            return (Groups.of_quota(grid, self.quota),)
        found = [self.heads(shape, unit, count, layout)]
        found += [Groups.of_neurons(grid, fan, share, count) for fan, share in self._fans()]
        return tuple(groups for groups in found if groups is not None)

    def require_room(
        self, shape: tuple[int, int], unit: tuple[int, int], count: int, layout: HeadLayout | None
    ) -> tuple[Groups, ...]:
        """The groups of a new layer. Raises InputError where not all of them can have what is asked."""
        groups = self.groups(shape, unit, count, layout)
        for neurons in with_heads_floors(groups):
            if neurons.least * neurons.count > count:
                raise InputError(
                    f"head_min_density {self.head_min_density:g} needs {neurons.least} units of every neuron, more "
                    f"than the mean of fan_{neurons.fan}, which is {count / neurons.count:.4g}: lower it"
                )
        return groups

    def _fans(self) -> list[tuple[Literal["in", "out"], tuple[float, float]]]:
        fans: list[tuple[Literal["in", "out"], tuple[float, float] | None]] = [
            ("in", self.fan_in),
            ("out", self.fan_out),
        ]
        return [(fan, share) for fan, share in fans if share is not None]


def is_rigid(groups: Sequence[Groups]) -> bool:
    """Whether no connection of a layer can move by itself: every row and every column has to keep its number."""
    return {part.fan for part in groups if part.least == part.most} >= {"in", "out"}


def require_quota(shapes: Mapping[str, Sequence[int]], quota: Quota) -> None:
    """Raises InputError for a layer that cannot have a quota; shapes: (out, in, kernel dimensions...) by name."""
    for name, shape in shapes.items():
        if len(shape) > 2:
            raise InputError(
                f"{argument('unit')} {quota} is for linear layers, and {name} is a convolution: leave it out with "
                f"{argument('exclude')}"
            )
        if shape[1] % quota.of:
            raise InputError(
                f"{argument('unit')} {quota} does not divide the {shape[1]} input features of layer {name}: choose "
                f"one that does, or leave the layer out with {argument('exclude')}"
            )
