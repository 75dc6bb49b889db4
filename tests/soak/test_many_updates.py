"""10,000 updates: what hundreds of them keep in the suite."""

from __future__ import annotations

import pytest

from tests.search.test_sparsifier import update_many_times

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("proposer", ["uniform", "layerwise", "guided", "shift"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_thousands_of_updates_keep_every_invariant(proposer: str, unit: tuple[int, int]) -> None:
    update_many_times(proposer, unit, 1250)
