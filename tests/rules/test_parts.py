"""What rules are made of: schedules, choices over all layers within bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.span import Horizon
from sparsae.core.cadence import Cubic, Periodic
from sparsae.core.observation import LayerView, Observation
from sparsae.core.topology import Topology
from sparsae.rules import GranetConfig, GseConfig, RiglConfig
from sparsae.rules.parts.choose import without_limits
from sparsae.rules.parts.exchange import CosineFraction
from sparsae.rules.parts.grow import largest_gradients
from sparsae.rules.parts.pruning import pruned_counts, smallest_overall

SCORES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, -3.0]), min_size=1, max_size=30)


@given(st.lists(SCORES, min_size=1, max_size=4), st.data())
def test_a_choice_over_all_layers_is_the_best_within_its_limits(layers: list[list[float]], data: st.DataObject) -> None:
    most = [data.draw(st.integers(0, len(layer))) for layer in layers]
    least = [data.draw(st.integers(0, high)) for high in most]
    n = data.draw(st.integers(sum(least), sum(most)))
    found = smallest_overall(
        {str(i): torch.tensor(layer) for i, layer in enumerate(layers)},
        n,
        {str(i): low for i, low in enumerate(least)},
        {str(i): high for i, high in enumerate(most)},
    )
    counts = [found[str(i)] for i in range(len(layers))]
    assert sum(counts) == n
    assert all(low <= count <= high for low, count, high in zip(least, counts, most, strict=True))
    # No split of n over the layers has a smaller sum.
    ordered = [sorted(layer) for layer in layers]
    splits = itertools.product(*(range(low, high + 1) for low, high in zip(least, most, strict=True)))
    sums = [
        sum(sum(layer[:count]) for layer, count in zip(ordered, split, strict=True))
        for split in itertools.islice(splits, 5000)
        if sum(split) == n
    ]
    total = sum(sum(layer[:count]) for layer, count in zip(ordered, counts, strict=True))
    assert all(total <= other + 1e-9 for other in sums)


def test_a_choice_that_its_limits_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="3 scores are not between 0 and 2"):
        smallest_overall({"a": torch.ones(4)}, 3, {"a": 0}, {"a": 2})


def test_the_cosine_is_the_papers() -> None:
    # f(t) = alpha / 2 (1 + cos(t pi / T_end)), with T_end = 75 of 100 steps.
    for t in (0, 10, 37.5, 74):
        assert CosineFraction(0.3, 0.75).at(t / 100) == pytest.approx(0.15 * (1 + math.cos(t * math.pi / 75)))
    assert CosineFraction(0.3, 0.75).at(0.75) == pytest.approx(0.0, abs=1e-12)
    assert CosineFraction(0.3, 0.75).at(0.9) == pytest.approx(0.0, abs=1e-12)


def test_updates_come_periodically_until_they_end() -> None:
    assert [t for t in range(1, 1001) if Periodic(100, stop=0.75).due(t, Horizon(1000))] == [
        100,
        200,
        300,
        400,
        500,
        600,
        700,
    ]
    assert [t for t in range(1, 401) if Periodic(100, stop=0.75).due(t, Horizon(400))] == [100, 200]
    assert [t for t in range(1, 201) if Periodic(100, stop=1.0).due(t, Horizon(200))] == [100]


def test_the_cubic_schedule_is_the_papers_and_ends_exactly() -> None:
    schedule = Cubic(0.25, 0.75, 10)
    assert [t for t in range(1, 101) if schedule.due(t, Horizon(100))] == [25, 35, 45, 55, 65, 75]
    assert schedule.left(3, Horizon(100)) == schedule.left(25, Horizon(100)) == 1.0
    assert schedule.left(35, Horizon(100)) == pytest.approx(0.8**3)
    assert schedule.left(75, Horizon(100)) == schedule.left(99, Horizon(100)) == 0.0


def test_a_cubic_schedule_from_the_first_step_moves_first_when_something_was_learned() -> None:
    schedule = Cubic(0.0, 0.5, 10)
    assert [t for t in range(1, 101) if schedule.due(t, Horizon(100))] == [10, 20, 30, 40, 50]
    assert schedule.left(10, Horizon(100)) == pytest.approx(0.8**3)


def test_rivals_begin_and_end_where_their_papers_do() -> None:
    granet, gse, rigl = GranetConfig(), GseConfig(), RiglConfig()
    assert (granet.start, granet.stop) == (0.0, 0.5)
    assert (gse.stop, rigl.stop) == (0.6, 0.75)


@given(st.integers(1, 300), st.integers(1, 200), st.floats(0, 0.99), st.floats(0.01, 1))
def test_every_cubic_schedule_ends(steps: int, every: int, start: float, span: float) -> None:
    schedule = Cubic(start, min(1.0, start + span), every)
    due = [t for t in range(1, steps + 1) if schedule.due(t, Horizon(steps))]
    left = [schedule.left(t, Horizon(steps)) for t in due]
    assert due
    assert left[-1] == 0.0
    assert left == sorted(left, reverse=True)
    assert due[-1] < steps or steps == 1


def view_of(values: list[float], units: int, **fields: object) -> LayerView:
    topology = Topology.from_indices((1, units), torch.arange(len(values)))
    return LayerView(topology, torch.tensor(values), (1, units), **fields)  # type: ignore[arg-type]


def test_what_is_dropped_may_be_grown_again_and_is_then_no_change() -> None:
    view = view_of(
        [1.0, 2.0, 3.0],
        6,
        sample=torch.tensor([3, 5], dtype=torch.int32),
        sample_gradient=torch.tensor([4.0, 7.0]),
        active_gradient=torch.tensor([5.0, 1.0, 9.0]),
    )
    drop, grow = without_limits(view, torch.tensor([0, 1]), 2, largest_gradients(view))
    # Of the gradients 5 and 1 (dropped), 4 and 7 (inactive), 7 and 5 are the largest: unit 0 never left.
    assert (drop.tolist(), grow.tolist()) == ([1], [5])
    drop, grow = without_limits(view, torch.tensor([0, 1]), 1, largest_gradients(view))
    assert (drop.tolist(), grow.tolist()) == ([0, 1], [5])
    drop, grow = without_limits(view, torch.tensor([], dtype=torch.int64), 0, largest_gradients(view))
    assert (drop.numel(), grow.numel()) == (0, 0)


def test_equal_gradients_come_in_the_order_of_their_units() -> None:
    view = view_of(
        [1.0, 2.0, 3.0],
        6,
        sample=torch.tensor([3, 4, 5], dtype=torch.int32),
        sample_gradient=torch.ones(3),
        active_gradient=torch.ones(3),
    )
    drop, grow = without_limits(view, torch.tensor([1, 2]), 2, largest_gradients(view))
    assert (drop.tolist(), grow.tolist()) == ([], [])
    drop, grow = without_limits(view, torch.tensor([2]), 1, largest_gradients(view))
    assert (drop.tolist(), grow.tolist()) == ([], [])


def test_pruning_is_by_layer_or_over_the_model() -> None:
    views = {
        "a": view_of([0.1, 0.2, 0.3, 0.4], 4, ends=(4, 2)),
        "b": view_of([1.0, 2.0, 3.0, 4.0], 8, ends=(4, 2)),
    }
    observation = Observation(views, 1, 2)
    magnitudes = {name: view.magnitude for name, view in views.items()}
    assert pruned_counts(observation, magnitudes, 0.5, "local") == {
        "a": 1,
        "b": 1,
    }
    assert pruned_counts(observation, magnitudes, 0.0, "local") == {
        "a": 2,
        "b": 2,
    }
    # All of "a" is smaller than anything in "b", but it keeps its one unit.
    assert pruned_counts(observation, magnitudes, 0.5, "global") == {
        "a": 2,
        "b": 0,
    }
    assert pruned_counts(observation, magnitudes, 0.0, "global") == {
        "a": 3,
        "b": 1,
    }
