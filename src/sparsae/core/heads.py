"""Which features of a linear layer belong to which attention head."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from sparsae.errors import InputError


@dataclass(frozen=True)
class HeadLayout:
    """Heads are consecutive groups of `size` features along one axis of a (out, in) weight.

    Raises InputError for another axis, and for a size that is no whole number of at least 1.
    """

    axis: Literal["out", "in"]
    size: int

    def __post_init__(self) -> None:
        if self.axis not in ("out", "in"):
            raise InputError(f"HeadLayout: axis must be 'out' or 'in', not {self.axis!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, Integral) or self.size < 1:
            raise InputError(f"HeadLayout: size must be the features of a head, at least 1, not {self.size!r}")

    def groups(self, out_features: int, in_features: int) -> int:
        """Number of groups; InputError where the size does not divide the features."""
        features = out_features if self.axis == "out" else in_features
        if features % self.size:
            raise InputError(f"heads of {self.size} features do not divide {features}")
        return features // self.size
