"""Budgets sum to exactly k inside their bounds and follow their formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.core.budgets import allocate, density_bounds, relative_density
from sparsae.errors import InputError


@given(
    st.lists(st.tuples(st.floats(1e-3, 1.0), st.integers(1, 10_000)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.floats(0.5, 1),
)
def test_allocation_is_exact_and_inside_its_bounds(
    layers: list[tuple[float, int]], share: float, low: float, high: float
) -> None:
    relative, units = [r for r, _ in layers], [n for _, n in layers]
    bounds = [density_bounds(n, low, high) for n in units]
    least, most = sum(b[0] for b in bounds), sum(b[1] for b in bounds)
    k = least + round(share * (most - least))
    counts = allocate(relative, bounds, units, k)
    assert sum(counts) == k
    assert all(b[0] <= count <= b[1] for count, b in zip(counts, bounds, strict=True))


def test_erk_has_densities_in_the_ratio_of_its_formula() -> None:
    shapes = [(768, 768), (3072, 768), (2304, 768)]
    units = [a * b for a, b in shapes]
    relative = [relative_density("erk", shape) for shape in shapes]
    counts = allocate(relative, [(1, n) for n in units], units, sum(units) // 10)
    densities = [count / n for count, n in zip(counts, units, strict=True)]
    ratio = ((768 + 768) / 768**2) / ((3072 + 768) / (3072 * 768))
    assert densities[0] / densities[1] == pytest.approx(ratio, rel=1e-4)


def test_a_saturated_layer_leaves_its_surplus_to_the_others() -> None:
    units = [10, 1000]
    counts = allocate([1.0, 0.01], [(1, 10), (1, 1000)], units, 400)
    assert counts == [10, 390]


def test_uniform_has_one_density() -> None:
    counts = allocate([1.0, 1.0, 1.0], [(1, 100), (1, 200), (1, 700)], [100, 200, 700], 100)
    assert counts == [10, 20, 70]


def test_erk_counts_kernel_dimensions_and_er_does_not() -> None:
    assert relative_density("erk", (8, 4, 3, 3)) == pytest.approx(18 / 288)
    assert relative_density("er", (8, 4, 3, 3)) == pytest.approx(12 / 32)


def test_bounds_that_cannot_hold_k_are_refused() -> None:
    with pytest.raises(InputError, match="bounds hold between 2 and 10 units, not the 11"):
        allocate([1.0, 1.0], [(1, 5), (1, 5)], [10, 10], 11)


def test_an_unknown_budget_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="uniform, er, erk"):
        relative_density("ekr", (2, 2))
