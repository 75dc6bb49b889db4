"""The evolution strategy: proposals, bounds, proxy, selection, adaptation, resets."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.span import Horizon
from sparsae.core.groups import Groups
from sparsae.core.heads import HeadLayout
from sparsae.core.observation import LayerView, Observation, head_counts, head_densities
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.rules import EvolutionConfig, ResetConfig, StaticConfig, build_rule
from sparsae.rules.evolution import Evolution
from sparsae.rules.parts.choose import keeps_limits
from sparsae.rules.parts.proposers import PROPOSERS, Guidance, reset
from sparsae.rules.parts.rule import Candidate
from sparsae.score import Score


def observe(seed: int = 0, unit: tuple[int, int] = (1, 1), bounds: tuple[int, int] | None = None) -> Observation:
    views = {}
    for index, shape in enumerate([(48, 32), (32, 64), (16, 16)]):
        rng = generator(seed, index)
        units = shape[0] * shape[1] // (unit[0] * unit[1])
        topology = Topology.random(shape, units // 5, rng, unit)
        sample = topology.sample_inactive(topology.count, rng)
        views[f"layer{index}"] = LayerView(
            topology,
            torch.randn(topology.values_shape, generator=rng),
            bounds or (1, units),
            gradient=torch.randn(topology.values_shape, generator=rng),
            sample=sample,
            sample_gradient=torch.randn(sample.numel(), *topology.values_shape[1:], generator=rng),
            active_gradient=torch.rand(topology.count, generator=rng),
            ends=(topology.count, topology.count // 2),
        )
    return Observation(views, 25, 100)


def assert_keeps_counts(observation: Observation, swap: Swap) -> None:
    assert swap.size == sum(units.numel() for units in swap.grow.values()) + swap.shrinks
    for name, view in observation.layers.items():
        empty = view.topology.indices[:0]
        drop, grow = swap.drop.get(name, empty), swap.grow.get(name, empty)
        assert bool(view.topology.contains(drop).all())
        assert not bool(view.topology.contains(grow).any())
        assert drop.unique().numel() == drop.numel()
        assert grow.unique().numel() == grow.numel()


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("name", PROPOSERS)
@given(st.floats(0.001, 1.0), st.integers(0, 2**32))
def test_every_proposer_makes_a_swap_that_holds(unit: tuple[int, int], name: str, rate: float, seed: int) -> None:
    observation = observe(seed % 7, unit)
    count = max(1, round(rate * observation.count))
    swap = PROPOSERS[name](observation, count, Guidance(1.0), generator(seed))
    assert_keeps_counts(observation, swap)
    assert swap.size <= count
    if rate < 0.5 and name != "rigl":  # whose dropped units may be grown at once
        assert swap.size == count


def test_layer_preserving_proposers_keep_each_layers_count() -> None:
    observation = observe()
    for name in ("layerwise", "guided", "rigl"):
        swap = PROPOSERS[name](observation, 100, Guidance(1.0), generator(1))
        assert set(swap.count_changes().values()) == {0}
    swap = PROPOSERS["shift"](observation, 100, Guidance(1.0), generator(1))
    assert any(swap.count_changes().values())


def test_guided_without_noise_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    observation = observe()
    swap = PROPOSERS["guided"](observation, 120, Guidance(), generator(1))
    for name, view in observation.layers.items():
        n = swap.drop[name].numel()
        smallest = view.values.abs().sort().indices[:n]
        assert set(swap.drop[name].tolist()) == set(view.topology.indices[smallest].tolist())
        assert view.sample is not None
        assert view.sample_gradient is not None
        largest = view.sample_gradient.abs().sort(descending=True).indices[:n]
        assert set(swap.grow[name].tolist()) == set(view.sample[largest].tolist())


def test_tempered_drops_follow_the_inverse_square_of_the_weight() -> None:
    topology = Topology.from_indices((1, 4), torch.tensor([0, 1]))
    view = LayerView(
        topology,
        torch.tensor([1.0, 2.0]),
        (1, 4),
        sample=torch.tensor([2], dtype=torch.int32),
        sample_gradient=torch.tensor([1.0]),
    )
    observation, rng = Observation({"a": view}, 0, 100), generator(5)
    drops = [int(PROPOSERS["guided"](observation, 1, Guidance(1.0), rng).drop["a"]) for _ in range(2000)]
    # Odds 1 / w^2: the unit weight is dropped 4 times out of 5.
    assert sum(d == 0 for d in drops) / 2000 == pytest.approx(0.8, abs=0.04)


def test_zero_weights_are_always_the_first_to_go() -> None:
    topology = Topology.from_indices((1, 8), torch.arange(4))
    view = LayerView(
        topology,
        torch.tensor([0.0, 1e-3, 5.0, 0.0]),
        (1, 8),
        sample=torch.arange(4, 8, dtype=torch.int32),
        sample_gradient=torch.ones(4),
    )
    swap = PROPOSERS["guided"](Observation({"a": view}, 0, 100), 2, Guidance(1.0), generator(0))
    assert sorted(swap.drop["a"].tolist()) == [0, 3]


def test_resets_move_what_they_say() -> None:
    observation, config = observe(), ResetConfig()
    names, sizes = set(), {"reshuffle": [], "redraw": []}
    for seed in range(40):
        name, swap = reset(observation, config, generator(seed))
        assert_keeps_counts(observation, swap)
        assert set(swap.count_changes().values()) == {0}
        names.add(name)
        sizes[name].append(swap.size / observation.count)
    assert names == {"reshuffle", "redraw"}
    assert all(0.045 <= share <= 0.105 for share in sizes["reshuffle"])
    # A new topology of density 1/5 shares a fifth of its units with the old one.
    assert all(0.7 <= share <= 0.9 for share in sizes["redraw"])


def test_a_candidate_outside_the_bounds_is_redrawn_and_given_up() -> None:
    observation = observe()
    tight = {
        name: dataclasses.replace(view, bounds=(view.topology.count, view.topology.count))
        for name, view in observation.layers.items()
    }
    rule = Evolution(EvolutionConfig(proposer="uniform", mutation_rate=0.5, candidates=3, bounds="redraw"))
    candidates = rule.ask(Observation(tight, 20, 100), rule.initial_state(), generator(0))
    assert [candidate.rejected for candidate in candidates] == ["bounds"] * 3
    decision, _ = rule.tell(candidates, [None] * 3, score(1.0), rule.initial_state(), 0.2)
    assert decision.chosen is None
    free = rule.ask(observation, rule.initial_state(), generator(0))
    assert [candidate.rejected for candidate in free] == [None] * 3


def test_head_floors_reject() -> None:
    topology = Topology.from_indices((8, 4), torch.arange(16))
    heads = HeadLayout("out", 2)
    assert head_counts(topology, heads).tolist() == [4, 4, 4, 4]
    assert head_densities(topology, heads).tolist() == [0.5] * 4
    view = LayerView(topology, torch.ones(16), (1, 32), (Groups.of_heads((8, 4), (1, 1), heads, 4),))
    nothing = topology.indices[:0]
    assert view.keeps_groups(nothing, nothing)
    moved, _ = topology.replace(topology.indices[:1], torch.tensor([17]))
    assert head_counts(moved, heads).tolist() == [4 - 1 + 1, 4, 4, 4]
    assert not keeps_limits({"layer": view}, Swap({"layer": topology.indices[:1]}, {"layer": torch.tensor([18])}))
    assert keeps_limits({"layer": view}, Swap({"layer": topology.indices[:1]}, {"layer": torch.tensor([17])}))


def score(cross_entropy: float, spread: float = 0.0, active: float = 0.0) -> Score:
    return {"cross_entropy": cross_entropy, "diversity": spread, "activity": active}


def candidates(n: int) -> list[Candidate]:
    return [Candidate(Swap({}, {}), "uniform") for _ in range(n)]


def test_elitist_stays_where_nothing_is_better_and_comma_moves() -> None:
    for selection, worse, better in (("elitist", None, 1), ("comma", 0, 1)):
        rule = Evolution(EvolutionConfig(selection=selection))
        state = rule.initial_state()
        decision, _ = rule.tell(candidates(2), [score(2.1), score(2.2)], score(2.0), state, 0.5)
        assert decision.chosen == worse
        decision, _ = rule.tell(candidates(2), [score(1.9), score(1.8)], score(2.0), state, 0.5)
        assert decision.chosen == better


def test_ties_go_to_the_first_and_nan_never_wins() -> None:
    rule = Evolution(EvolutionConfig())
    decision, _ = rule.tell(
        candidates(3), [score(math.nan), score(1.5), score(1.5)], score(2.0), rule.initial_state(), 0.5
    )
    assert decision.chosen == 1


def test_a_plateau_makes_resets_likelier_for_two_updates() -> None:
    rule = Evolution(
        EvolutionConfig.model_validate({"reset": {"probability": 0.02, "patience": 5, "boosted_probability": 0.1}})
    )
    state, seen = rule.initial_state(), []
    for cross_entropy in [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.5, 2.5, 1.9]:
        seen.append(rule.reset_probability(state))
        _, state = rule.tell(candidates(1), [score(3.0)], score(cross_entropy), state, 0.5)
    assert seen == [0.02] * 6 + [0.1, 0.1, 0.02]


def test_success_shrinks_and_stagnation_grows_the_search() -> None:
    rule = Evolution(
        EvolutionConfig.model_validate({"candidates": 4, "mutation_rate": 0.005, "adaptation": {"enabled": True}})
    )
    state = rule.initial_state()
    for _ in range(2):
        _, state = rule.tell(candidates(1), [score(1.0)], score(2.0), state, 0.5)
    assert (state.candidates, state.mutation_rate) == (3, pytest.approx(0.004))
    for _ in range(20):
        _, state = rule.tell(candidates(1), [score(3.0)], score(2.0), state, 0.5)
    assert (state.candidates, state.mutation_rate) == (5, 0.01)


def test_due_steps() -> None:
    rule = Evolution(EvolutionConfig(every=10, start=0.1, stop=0.5))
    assert [step for step in range(1, 101) if rule.due(step, Horizon(100))] == [20, 30, 40, 50]
    assert sum(Evolution(EvolutionConfig(stop=1.0)).due(step, Horizon(1000)) for step in range(1, 1001)) == 19
    assert not build_rule(StaticConfig()).due(1, Horizon(2))


def test_mutation_rate_follows_its_schedule() -> None:
    rule = Evolution(EvolutionConfig(mutation_rate=0.3, start=0.0, stop=0.5))
    state = rule.initial_state()
    assert rule.mutation_rate(state, 0.0) == pytest.approx(0.3)
    assert rule.mutation_rate(state, 0.25) == pytest.approx(0.15)
    assert rule.mutation_rate(state, 0.9) == pytest.approx(0.0)


def test_without_scores_comma_takes_its_one_candidate_and_elitist_refuses() -> None:
    rule = Evolution(EvolutionConfig()).without_scores()
    assert rule.needs == {"gradient_at"}
    proposed = rule.ask(observe(), rule.initial_state(), generator(0))
    assert len(proposed) == 1
    decision, _ = rule.tell(proposed, [None], None, rule.initial_state(), 0.1)
    assert decision.chosen == 0
    with pytest.raises(InputError, match="elitist"):
        Evolution(EvolutionConfig(selection="elitist")).without_scores()
