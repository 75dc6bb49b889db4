"""Which features of a linear layer belong to which attention head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsae.errors import InputError


@dataclass(frozen=True)
class HeadLayout:
    """Heads are consecutive groups of `size` features along one axis of a (out, in) weight."""

    axis: Literal["out", "in"]
    size: int

    def groups(self, out_features: int, in_features: int) -> int:
        """Number of groups; InputError where the size does not divide the features."""
        features = out_features if self.axis == "out" else in_features
        if features % self.size:
            raise InputError(f"heads of {self.size} features do not divide {features}")
        return features // self.size
