"""Sets of units as bits and as lists, beside Python's sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.core.marks import Bits, Listed, restored, set_of
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), kind=st.sampled_from([Bits, Listed]), data=st.data())
def test_they_are_sets(rows: int, columns: int, kind: type, data: st.DataObject) -> None:
    units = rows * columns
    few = st.sets(st.integers(0, units - 1), max_size=units)
    naive = data.draw(few)
    indices = torch.tensor(sorted(naive), dtype=torch.int32)
    tensor = indices if kind is Listed else set_of(Topology((rows, columns), torch.arange(units))).tensor * 0
    made = restored(units, tensor)
    made.add(indices)
    everything = torch.arange(units, dtype=torch.int32)
    for added in data.draw(st.lists(few, max_size=4)):
        order = torch.tensor(data.draw(st.permutations(sorted(added))), dtype=torch.int32)
        assert isinstance(made, kind)
        assert int(made.add(order)) == len(added - naive)
        naive |= added
        assert {unit for unit, is_in in enumerate(made.contains(everything).tolist()) if is_in} == naive
        assert int(made.count()) == len(naive)
        made = restored(units, made.tensor)


def test_bits_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="17 units are 3 bytes of bits, not 2"):
        restored(17, torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize(("count", "nbytes"), [(120, 64 * 480 // 8), (119, 4 * 119)])
def test_what_takes_less_memory_is_taken(count: int, nbytes: int) -> None:
    topology = Topology.random((64, 480), count, generator(0))
    assert set_of(topology).tensor.nbytes == nbytes
