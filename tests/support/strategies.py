"""Random shapes, units and topologies for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology, grid_size

UNITS = [(1, 1), (4, 4), (2, 3), (16, 16)]


@st.composite
def topologies(draw: st.DrawFn, units: list[tuple[int, int]] = UNITS, most: int = 12) -> Topology:
    """Any topology of up to most x most units, from empty to full."""
    unit = draw(st.sampled_from(units))
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    shape = (rows * unit[0], columns * unit[1])
    count = draw(st.integers(0, grid_size(shape, unit)))
    return Topology.random(shape, count, generator(draw(st.integers(0, 2**32)), "test"), unit)
