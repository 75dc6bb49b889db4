"""The densities above which layers are multiplied densely, held against what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout
from sparsae.kernels.cpu.breakeven import highest_density, pays

MEASURED = sorted((Path(__file__).parents[2] / "docs/results/kernels").glob("thresholds-*.json"))


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_no_measured_layer_is_slower_than_dense_products_below_its_limit(file: Path) -> None:
    rows = json.loads(file.read_text())
    below = [row for row in rows if 1 - row["sparsity"] <= highest_density(_pair(row["unit"])) + 1e-9]
    assert min(row["cpu_ratio"] for row in below) > 1
    limits = {highest_density(_pair(row["unit"])) for row in rows}
    assert len(limits) == 5
    # Something of every kind was measured below its limit, and above it.
    assert {highest_density(_pair(row["unit"])) for row in below} == limits
    assert {highest_density(_pair(row["unit"])) for row in rows if row not in below} == limits


@pytest.mark.parametrize(
    ("unit", "limit"), [((1, 1), 0.36), ((8, 4), 0.45), ((6, 6), 0.25), ((2, 2), 0.15), ((3, 12), 0.15), ((2, 1), 0.1)]
)
def test_a_layer_is_multiplied_densely_above_the_limit_of_its_units(unit: tuple[int, int], limit: float) -> None:
    assert highest_density(unit) == limit
    shape = 48, 48
    units = (48 // unit[0]) * (48 // unit[1])

    def layout(count: int) -> Layout:
        topology = Topology.random(shape, count, generator(0, "breakeven"), unit)
        return Layout(topology.shape, topology.unit, topology.indices)

    last = int(limit * units)
    assert pays(layout(last), torch.float32)
    assert not pays(layout(last + 1), torch.float32)
    assert not pays(layout(last), torch.float64)


def _pair(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second
