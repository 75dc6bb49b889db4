"""First topologies: exact counts, heads above their floors, neurons inside their limits, all at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae import HeadLayout, sparse_layers, sparsify
from sparsae.config.load import resolve
from sparsae.core.drawing import random_topology
from sparsae.core.observation import head_counts
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology, sample_distinct
from sparsae.errors import InputError
from sparsae.nn.limits import Limits

FANS = st.none() | st.tuples(st.floats(0, 1), st.floats(1, 4)) | st.just((1.0, 1.0))
UNITS = st.sampled_from([(1, 1), (2, 2)])


def degrees(topology: Topology) -> tuple[Tensor, Tensor]:
    rows, columns = topology.grid
    return (
        torch.bincount(topology.rows.long(), minlength=rows),
        torch.bincount(topology.columns.long(), minlength=columns),
    )


@given(FANS, FANS, UNITS, st.floats(0.1, 1.0), st.floats(0.0, 0.9), st.sampled_from(["out", "in"]), st.integers(0, 99))
def test_a_first_topology_keeps_everything_at_once(
    fan_in: tuple[float, float] | None,
    fan_out: tuple[float, float] | None,
    unit: tuple[int, int],
    density: float,
    floor: float,
    axis: str,
    seed: int,
) -> None:
    shape, heads = (16, 24), HeadLayout(axis, 4)  # type: ignore[arg-type]
    units = 16 * 24 // (unit[0] * unit[1])
    count = round(density * units)
    limits = Limits(0.7 * floor * density, fan_in, fan_out)
    try:
        groups = limits.require_room(shape, unit, count, heads)
    except InputError:
        if not floor:
            raise
        assume(False)  # rounded up, the floors of heads ask more than there is
    topology = random_topology(shape, unit, count, groups, generator(seed, "test"))
    Topology.from_indices(shape, topology.indices, unit)
    assert topology.count == count
    floors = limits.heads(shape, unit, count, heads)
    assert floors is None or int(head_counts(topology, heads).min()) >= floors.least
    for share, counts in zip((fan_in, fan_out), degrees(topology), strict=True):
        if share is not None:
            mean = count / counts.numel()
            assert share[0] * mean - 1 < int(counts.min())
            assert int(counts.max()) < share[1] * mean + 1
        if share == (1.0, 1.0):
            assert int(counts.max()) - int(counts.min()) <= 1


@pytest.mark.parametrize("axis", ["out", "in"])
def test_floors_of_heads_alone_are_drawn_head_by_head(axis: str) -> None:
    # As it has always been, draw by draw: runs with such floors start from the topologies that they had.
    heads, rng = HeadLayout(axis, 4), generator(0, "test")  # type: ignore[arg-type]
    groups = Limits(0.1).groups((8, 12), (1, 1), 30, heads)
    topology = random_topology((8, 12), (1, 1), 30, groups, generator(0, "test"))
    chosen = []
    for head in range(heads.groups(8, 12)):
        local = sample_distinct(48 if axis == "out" else 32, 5 if axis == "out" else 4, rng)
        height = 4 if axis == "out" else 8
        row, column = local % height, local // height
        chosen.append((column * 8 + row + 4 * head) if axis == "out" else (column + 4 * head) * 8 + row)
    floors = Topology.from_indices((8, 12), torch.cat(chosen))
    rest = floors.sample_inactive(30 - floors.count, rng)
    assert topology.indices.equal(floors.replace(floors.indices[:0], rest)[0].indices)


def test_sparsify_bounds_the_neurons_of_every_layer() -> None:
    network = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 50))
    model = sparsify(network, 0.8, fan_in=(1, 1), fan_out=(0.5, 1.5), seed=3)
    for layer in sparse_layers(model).values():
        fan_in, fan_out = degrees(layer.topology)
        assert int(fan_in.max()) - int(fan_in.min()) <= 1
        mean = layer.topology.count / layer.in_features
        assert int(mean / 2) <= int(fan_out.min())
        assert int(fan_out.max()) < 1.5 * mean + 1
    assert sum(layer.topology.count for layer in sparse_layers(model).values()) == round(0.2 * (2400 + 2000))


@pytest.mark.parametrize("value", [1.0, (1.0,), (1.5, 2.0), (0.5, 0.9), (-0.1, 2.0), ("a", 2.0), (0.5, float("inf"))])
def test_limits_that_exclude_the_mean_are_refused(value: object) -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    message = "fan_out: must be the least and the most in terms of the mean, such as"
    with pytest.raises(InputError, match=message):
        sparsify(network, 0.5, fan_out=value)  # type: ignore[arg-type]
    assert isinstance(network[0], nn.Linear)
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    with pytest.raises(InputError, match=r"sparsity\.fan_out"):
        resolve(overrides=[f"sparsity.fan_out={text.replace('inf', '.inf')}"])


def test_heads_that_ask_more_of_neurons_than_their_mean_are_refused() -> None:
    with pytest.raises(InputError, match=r"needs 5 units of every neuron, more than the mean of fan_in, .* 4\.5"):
        Limits(4.2 / 12, (1.0, 1.0)).require_room((8, 12), (1, 1), 36, HeadLayout("out", 4))
