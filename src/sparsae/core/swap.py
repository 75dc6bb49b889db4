"""A proposed change of topologies. Rules make them; `surgery` carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Swap:
    """A proposed change over the whole model: flat unit numbers to drop and to grow, by layer.

    As many units are grown as are dropped, but for `shrinks`: that many more are dropped, and the model is smaller
    afterwards (larger, where it is negative).
    """

    drop: Mapping[str, Tensor]
    grow: Mapping[str, Tensor]
    shrinks: int = 0

    @property
    def size(self) -> int:
        """Units that are dropped."""
        return sum(units.numel() for units in self.drop.values())

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return not any(units.numel() for units in (*self.drop.values(), *self.grow.values()))

    def count_changes(self) -> dict[str, int]:
        """Change of each touched layer's number of active units."""
        names = list(dict.fromkeys([*self.drop, *self.grow]))
        return {name: _size(self.grow, name) - _size(self.drop, name) for name in names}


def _size(units: Mapping[str, Tensor], name: str) -> int:
    return units[name].numel() if name in units else 0
