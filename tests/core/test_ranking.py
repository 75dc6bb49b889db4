"""Rankings: the naive twins' choices, ties and NaN included, and nothing that waits for a device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsae.core.ranking import best_of_each, kth_smallest, largest, places, search, select, smallest

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Neighbours in every dtype, values that only a wide one tells apart, zeros of both signs, and no numbers.
NUMBERS = [0.0, -0.0, 1.0, 1.5, -3.0, 1e-30, -1e-30, 1e300, math.inf, -math.inf, math.nan, -math.nan]
SCORES = st.builds(
    lambda values, dtype: torch.tensor(values, dtype=torch.float64).to(dtype),
    st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=30),
    st.sampled_from(DTYPES),
)


def ascending(scores: Tensor, positions: list[int]) -> list[int]:
    """Positions from the smallest score to the largest, equal ones as they come, NaN last."""
    values = scores.double().tolist()
    return sorted(positions, key=lambda i: (math.isnan(values[i]), 0.0 if math.isnan(values[i]) else values[i], i))


@given(SCORES, st.integers(0, 30))
def test_the_smallest_and_the_largest_are_those_of_sorting(scores: Tensor, n: int) -> None:
    n, everything = min(n, scores.numel()), list(range(scores.numel()))
    assert smallest(scores, n).tolist() == sorted(ascending(scores, everything)[:n])
    assert largest(scores, n).tolist() == sorted(ascending(-scores, everything)[:n])


@given(SCORES, st.integers(1, 4), st.data())
def test_a_selection_takes_the_best_that_its_groups_allow(scores: Tensor, count: int, data: st.DataObject) -> None:
    sizes = [0] * count
    groups = []
    for _ in range(scores.numel()):
        groups.append(data.draw(st.integers(0, count - 1)))
        sizes[groups[-1]] += 1
    most = [data.draw(st.integers(0, size)) for size in sizes]
    least = [data.draw(st.integers(0, high)) for high in most]
    n = data.draw(st.integers(sum(least), sum(most)))
    # Of each group its best, as many as it must have; then whatever is next and still allowed.
    taken, room = [], list(most)
    for g in range(count):
        taken += ascending(scores, [i for i in range(len(groups)) if groups[i] == g])[: least[g]]
        room[g] -= least[g]
    for i in ascending(scores, [i for i in range(len(groups)) if i not in taken]):
        if len(taken) < n and room[groups[i]]:
            taken.append(i)
            room[groups[i]] -= 1
    chosen = select(scores, n, torch.tensor(groups), torch.tensor(least), torch.tensor(most))
    assert chosen.tolist() == sorted(taken)
    order = sorted(range(len(groups)), key=lambda i: groups[i])
    one_after_another = select(scores[order], n, sizes, least, most)
    again = select(scores[order], n, torch.tensor(groups)[order], torch.tensor(least), torch.tensor(most))
    assert one_after_another.tolist() == again.tolist()


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, -3.0]), min_size=1, max_size=8), st.data())
def test_no_selection_within_the_limits_is_better(values: list[float], data: st.DataObject) -> None:
    groups = [data.draw(st.integers(0, 1)) for _ in values]
    most = [data.draw(st.integers(0, groups.count(g))) for g in (0, 1)]
    least = [data.draw(st.integers(0, high)) for high in most]
    n = data.draw(st.integers(sum(least), sum(most)))
    chosen = select(torch.tensor(values), n, torch.tensor(groups), torch.tensor(least), torch.tensor(most)).tolist()
    sums = [
        sum(values[i] for i in some)
        for some in itertools.combinations(range(len(values)), n)
        if all(
            low <= sum(groups[i] == g for i in some) <= high
            for g, (low, high) in enumerate(zip(least, most, strict=True))
        )
    ]
    assert sum(values[i] for i in chosen) == min(sums)


def test_nothing_waits_for_a_device() -> None:
    # A tensor on the meta device has no values: whatever would have to be read back from it raises.
    groups = torch.empty(50, dtype=torch.int64, device="meta")
    limits = torch.empty(5, dtype=torch.int64, device="meta")
    for dtype in DTYPES:
        scores = torch.empty(50, dtype=dtype, device="meta")
        chosen = [
            smallest(scores, 20),
            largest(scores, 20),
            select(scores, 20, groups, limits, limits),
            select(scores, 20, [20, 30], [0, 7], [20, 15]),
        ]
        assert all(at.shape == (20,) and at.device.type == "meta" for at in chosen)
        assert best_of_each(scores, groups, limits).shape == places(scores, groups, 5).shape == (50,)


@pytest.mark.parametrize(
    "wait", [lambda x: bool(x.any()), lambda x: int(x.sum()), lambda x: x.nonzero(), lambda x: x[x > 0], Tensor.tolist]
)
def test_the_check_for_waiting_finds_it(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        wait(torch.empty(50, device="meta"))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot take 6 of 5"):
        largest(torch.zeros(5), 6)


@given(SCORES, st.data())
def test_the_kth_smallest_is_torchs(scores: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.numel()))
    found = kth_smallest(scores, k)
    assert (found.shape, found.dtype) == ((), scores.dtype)
    assert found.nan_to_num(77.0) == scores.kthvalue(k).values.nan_to_num(77.0)


@given(
    ascending=st.lists(st.integers(0, 20), max_size=20),
    numbers=st.lists(st.integers(-1, 21), max_size=20),
    dtypes=st.sampled_from([(torch.int32, torch.int32), (torch.int64, torch.int64), (torch.int32, torch.int64)]),
    right=st.booleans(),
)
def test_a_search_is_torchs(
    ascending: list[int], numbers: list[int], dtypes: tuple[torch.dtype, torch.dtype], right: bool
) -> None:
    lines = torch.tensor(sorted(ascending), dtype=dtypes[0])
    wanted = torch.tensor(numbers, dtype=dtypes[1])
    found = search(lines, wanted, right=right)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.searchsorted(lines, wanted, right=right))
