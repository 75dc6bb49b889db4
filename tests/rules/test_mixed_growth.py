"""Growth of which a share is uniformly random: exact shares, the best of the rest, every inactive unit alike."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsae.core.observation import LayerView, Observation
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.registry import RULES
from sparsae.rules import RiglConfig, build_rule
from sparsae.rules.generations import GenerationsConfig
from sparsae.rules.parts.grow import Growth, largest_gradients, tempered, with_random
from sparsae.rules.parts.proposers import PROPOSERS, Guidance

SHAPES = {"a": (40, 30), "b": (30, 50)}
GUIDED = {
    "gse-local": ("gse", {"scope": "local"}),
    "gse": ("gse", {"scope": "global"}),
    "rigl": ("rigl", {}),
    "generations": ("generations", {}),
    "evolution": ("evolution", {"proposer": "guided", "candidates": 1, "drop_temperature": 0.0}),
    "evolution-rigl": ("evolution", {"proposer": "rigl", "candidates": 1, "drop_temperature": 0.0}),
}


def observed(seed: int, dense: bool, unit: tuple[int, int] = (1, 1)) -> Observation:
    """Two layers; all gradients differ, and those of active units are the smallest, so that nothing returns."""
    views = {}
    for name, shape in SHAPES.items():
        grid = shape[0] // unit[0] * (shape[1] // unit[1])
        rng = generator(seed, name)
        topology = Topology.random(shape, grid // 5, rng, unit)
        count = topology.units - topology.count if dense else topology.count
        sample = topology.sample_inactive(count, rng)
        gradient = (1 + torch.randperm(count, generator=rng).double() + len(views) / 2) * (1 if dense else -1)
        views[name] = LayerView(
            topology,
            torch.randn(topology.count, generator=rng),
            (1, topology.units),
            sample=sample,
            sample_gradient=gradient,
            active_gradient=torch.zeros(topology.count, dtype=torch.float64) if dense else None,
        )
    return Observation(views, step=10, steps=100)


def grown(case: str, share: float, seed: int, move: float) -> tuple[Observation, dict[str, Tensor]]:
    name, settings = GUIDED[case]
    amount = "mutation_rate" if name == "evolution" else "drop_fraction"
    config = RULES[name].settings.model_validate({**settings, amount: move, "random_share": share})
    rule = build_rule(config)  # type: ignore[arg-type]
    observation = observed(seed, "dense_gradient" in rule.needs)
    (candidate,) = rule.ask(observation, rule.initial_state(), generator(seed, "ask"))
    assert candidate.swap.size == sum(units.numel() for units in candidate.swap.grow.values())
    nothing = torch.zeros(0, dtype=torch.int32)
    return observation, {name: candidate.swap.grow.get(name, nothing) for name in SHAPES}


@pytest.mark.parametrize("case", GUIDED)
@given(share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]), seed=st.integers(0, 20), move=st.sampled_from([0.1, 0.5]))
def test_shares_are_exact_and_the_rest_is_the_best(case: str, share: float, seed: int, move: float) -> None:
    observation, units = grown(case, share, seed, move)
    _, whole = grown(case, 0.0, seed, move)
    n = sum(each.numel() for each in units.values())
    assert n == sum(each.numel() for each in whole.values()) > 0
    together = case == "gse"
    groups = [list(observation.layers)] if together else [[name] for name in observation.layers]
    for names in groups:
        n = sum(units[name].numel() for name in names)
        by_gradient = n - round(share * n)
        # Whatever chance took: of all that was looked at, the best are there, and what is no best was chance.
        ranked = sorted(
            (
                (float(size), name, unit)
                for name in names
                for size, unit in zip(
                    _magnitudes(observation.layers[name]),
                    observation.layers[name].sample.tolist(),
                    strict=True,  # type: ignore[union-attr]
                )
            ),
            reverse=True,
        )
        best = {(name, unit) for _, name, unit in ranked[:by_gradient]}
        taken = {(name, unit) for name in names for unit in units[name].tolist()}
        assert best <= taken
        if share == 0.0:
            assert best == taken
        # The last by gradient is followed, in their order, by as many as chance had taken of those before it.
        others = taken - best
        assert len(others) == n - by_gradient == round(share * n)


def _magnitudes(view: LayerView) -> list[float]:
    assert view.sample_gradient is not None
    return [float(size) for size in view.sample_gradient.abs()]


@given(n=st.integers(0, 60), k=st.integers(1, 60), seed=st.integers(0, 50))
def test_what_is_random_comes_first_and_once(n: int, k: int, seed: int) -> None:
    view = observed(seed, dense=False).layers["a"]
    growth = largest_gradients(view)
    mixed = with_random(view, growth, n, generator(seed, "mix"))
    drawn = view.topology.sample_inactive(n, generator(seed, "mix")).tolist()
    assert mixed.units.tolist()[:n] == drawn
    assert mixed.units.unique().numel() == mixed.units.numel()
    assert set(mixed.units.tolist()) == {*drawn, *growth.units.tolist()}
    scores = dict(zip(growth.units.tolist(), growth.scores.tolist(), strict=True))
    for unit, score in zip(mixed.units.tolist(), mixed.scores.tolist(), strict=True):
        assert score == (math.inf if unit in drawn else scores[unit])
    rest = sorted((unit for unit in scores if unit not in drawn), key=scores.__getitem__)[-k:]
    order = mixed.scores.argsort(descending=True)[: n + len(rest)]
    assert set(mixed.units[order].tolist()) == {*drawn, *rest}


def test_chance_is_the_same_for_every_inactive_unit() -> None:
    observation = observed(0, dense=False)
    view, counts, rounds = observation.layers["a"], Counter[int](), 4000
    for seed in range(rounds):
        growth = with_random(view, Growth(view.topology.indices[:0], torch.zeros(0)), 12, generator(seed, "even"))
        counts.update(growth.units.tolist())
    inactive = view.topology.units - view.topology.count
    expected = rounds * 12 / inactive
    assert len(counts) == inactive
    chi = sum((seen - expected) ** 2 / expected for seen in counts.values())
    assert chi < inactive + 5 * math.sqrt(2 * inactive)


def test_a_temperature_draws_with_odds_by_the_gradient() -> None:
    sizes, rounds = torch.tensor([1.0, 2.0, 4.0]), 6000
    rng = generator(0, "odds")
    first = Counter(int(tempered(sizes, 2.0, rng).argmax()) for _ in range(rounds))  # odds |g|^(2 / 2)
    for index, odds in enumerate((1, 2, 4)):
        assert first[index] / rounds == pytest.approx(odds / 7, abs=0.02)
    assert tempered(torch.zeros(1), 1.0, rng).tolist() == [-math.inf]


def test_generations_looks_at_gradients_only_where_it_grows_by_them() -> None:
    assert build_rule(GenerationsConfig()).needs == frozenset()
    assert build_rule(GenerationsConfig(window=50)).window.steps == 1
    guided = build_rule(GenerationsConfig(random_share=0.5, window=50, window_every=5, sample_ratio=0.5))
    assert guided.needs == {"gradient_at"}
    assert (guided.window.steps, guided.window.every) == (50, 5)
    assert guided.probed_units(100, 1000) == 50
    observation = observed(3, dense=False)
    swaps = [
        build_rule(GenerationsConfig(random_share=0.0, grow_temperature=t)).ask(observation, None, generator(1))[0].swap
        for t in (0.0, 5.0)
    ]
    assert not torch.equal(swaps[0].grow["a"], swaps[1].grow["a"])


@pytest.mark.parametrize("rule", ["gse", "rigl", "evolution"])
@pytest.mark.parametrize("share", [1.0, -0.1, 1.5, math.nan])
def test_a_share_that_leaves_nothing_to_gradients_is_refused(rule: str, share: Any) -> None:
    with pytest.raises(ValueError, match="random_share"):
        RULES[rule].settings.model_validate({"random_share": share})


@pytest.mark.parametrize("proposer", ["guided", "rigl"])
def test_guided_proposals_of_one_generator_agree(proposer: str) -> None:
    observation = observed(1, dense=proposer == "rigl")
    swaps = [PROPOSERS[proposer](observation, 40, Guidance(1.0, 1.0, 0.5), generator(3)) for _ in range(2)]
    for name in SHAPES:
        assert torch.equal(swaps[0].grow[name], swaps[1].grow[name])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("inactive", [0, 1, 7])
def test_no_more_is_drawn_than_is_inactive(inactive: int, share: float) -> None:
    """Of a nearly dense layer; by the dense gradient what is dropped may return, so that more can grow than that."""
    rng, units = generator(0, "nearly dense"), 20 * 10
    topology = Topology.random((20, 10), units - inactive, rng)
    sample = topology.sample_inactive(inactive, rng)
    view = LayerView(
        topology,
        torch.randn(topology.count, generator=rng),
        (1, units),
        sample=sample,
        sample_gradient=torch.ones(inactive),
        active_gradient=torch.rand(topology.count, generator=rng),
    )
    rule = build_rule(RiglConfig(random_share=share, drop_fraction=0.3))
    swap = rule.ask(Observation({"a": view}, step=10, steps=100), rule.initial_state(), generator(1))[0].swap
    empty = topology.indices[:0]
    dropped, grown = swap.drop.get("a", empty), swap.grow.get("a", empty)
    assert dropped.numel() == grown.numel() >= min(inactive, round(share * int(0.3 * topology.count)))
    assert set(grown.tolist()) <= set(sample.tolist())
