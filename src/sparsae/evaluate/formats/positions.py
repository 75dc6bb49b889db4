"""The positions of active units in as few bytes as simple codes allow: a bit for each unit, or a byte for each gap.

Below one active unit in eight, gaps are shorter; above, bits are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Code = Literal["bits", "gaps"]
Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]

_SKIP = 255  # a byte of gaps that stands for so many inactive units, and for no active one


def encode(positions: Positions, units: int) -> tuple[Code, Bytes]:
    """Ascending positions below `units`, in the shorter code."""
    gaps = np.diff(positions, prepend=-1) - 1
    skips = gaps // _SKIP
    if len(positions) + int(skips.sum()) >= -(-units // 8):
        bits = np.zeros(units, bool)
        bits[positions] = True
        return "bits", np.packbits(bits)
    found = np.full(len(positions) + int(skips.sum()), _SKIP, np.uint8)
    found[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return "gaps", found


def decode(code: Code, data: Bytes, units: int) -> Positions:
    """The inverse of `encode`. Raises ValueError for bytes that are none of its."""
    if code == "bits":
        if len(data) != -(-units // 8):
            raise ValueError(f"{len(data)} bytes are not a bit for each of {units} units")
        bits = np.unpackbits(data)
        if bits[units:].any():
            raise ValueError("there are positions behind the last one")
        return np.flatnonzero(bits[:units])
    if code != "gaps":
        raise ValueError(f"no code is called {code!r}")
    is_active = data < _SKIP
    positions = (np.cumsum(data.astype(np.int64) + is_active) - 1)[is_active]
    if len(data) and (not is_active[-1] or positions[-1] >= units):
        raise ValueError("there are positions behind the last one")
    return positions
