"""The pure part of strategy evolution: genomes, credit, and what is found by progress."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.span import Horizon
from sparsae.core.randomness import generator
from sparsae.rules import DamageConfig, GenerationsConfig, StrategyConfig, build_rule
from sparsae.rules.parts.evolved import Evolved
from sparsae.rules.parts.strategy import Gene, Strategy, StrategyState

GENES = (Gene("rate", 0.1, 0.5), Gene("share", 0.0, 1.0), Gene("interval", 1.0, 4.0, whole=True))


def strategy_of(genes: tuple[Gene, ...] = GENES, **settings: Any) -> Strategy:
    config = StrategyConfig.model_construct(**{"fitness": "progress", **settings})
    return Strategy(genes, (0.5,) * len(genes), config)


def lived(strategy: Strategy, losses: Sequence[float], seed: int = 0) -> list[StrategyState]:
    """The states from before the first loss to after the last."""
    states = [strategy.begin()]
    for i, loss in enumerate(losses):
        states.append(strategy.after(states[-1], loss, generator(seed, i)))
    return states


@given(
    losses=st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf]), max_size=40),
    trial=st.integers(1, 4),
    reach=st.integers(0, 3),
    mutation=st.floats(1e-3, 50.0),
    fitness=st.sampled_from(["progress", "shuffled"]),
)
def test_a_genome_stays_in_its_ranges_and_its_state_in_json(
    losses: list[float], trial: int, reach: int, mutation: float, fitness: str
) -> None:
    strategy = strategy_of(trial=trial, reach=reach, mutation=mutation, memory=3, fitness=fitness)
    for state in lived(strategy, losses):
        values = strategy.values(state)
        assert all(gene.low <= values[gene.name] <= gene.high for gene in GENES)
        assert values["interval"] == int(values["interval"])
        assert all(0.0 <= x <= 1.0 for x in state.genome)
        assert len(state.trials) <= 3
        assert len(state.fitness) <= trial + reach
        assert StrategyState.from_dict(json.loads(json.dumps(dataclasses.asdict(state), allow_nan=False))) == state


@given(st.floats(1e-3, 1e3), st.floats(1.001, 1e3), st.floats(0.0, 1.0), st.booleans())
def test_a_gene_goes_from_its_low_to_its_high_end_and_back(low: float, ratio: float, x: float, from_zero: bool) -> None:
    gene = Gene("number", 0.0 if from_zero else low, low * ratio)
    assert gene.value(0.0) == pytest.approx(gene.low)
    assert gene.value(1.0) == pytest.approx(gene.high)
    assert gene.place(gene.value(x)) == pytest.approx(x, abs=1e-6)
    assert gene.place(gene.high * 2) == pytest.approx(1.0)


@given(losses=st.lists(st.floats(0.0, 10.0), min_size=2, max_size=40), trial=st.integers(1, 4), reach=st.integers(0, 3))
def test_credit_is_the_mean_fitness_of_a_trial_and_of_what_follows_it(
    losses: list[float], trial: int, reach: int
) -> None:
    strategy = strategy_of(trial=trial, reach=reach, memory=100)
    states = lived(strategy, losses)
    # The naive twin: from all losses at once, and the genomes that were in force after each update.
    fitness, mean, variance = [], 0.0, 0.0
    for n, (before, after) in enumerate(itertools.pairwise(losses), 1):
        off, weight = before - after - mean, 1 / min(n, 2 * (trial + reach))
        if n > 1:
            variance = (1 - weight) * variance + weight * off**2
        fitness.append(0.0 if n == 1 or variance <= 0 else min(3.0, max(-3.0, off / variance**0.5)))
        mean += weight * off
    expected = []
    for first in range(0, len(losses), trial):
        counted = fitness[first : first + trial + reach]
        if len(counted) == trial + reach:
            in_force = {states[i].genome for i in range(first, first + trial)}
            assert len(in_force) == 1
            expected.append((in_force.pop(), sum(counted) / len(counted)))
    found = [(one.genome, one.credit) for one in states[-1].trials]
    assert [genome for genome, _ in found] == [genome for genome, _ in expected]
    assert [credit for _, credit in found] == pytest.approx([credit for _, credit in expected], abs=1e-5)


def test_the_next_genome_is_near_the_mean_of_the_better_half() -> None:
    strategy = strategy_of(trial=2, reach=0, memory=4, mutation=1e-9)
    losses = [10.0 - i + (0.5 if i % 5 == 0 else 0.0) for i in range(20)]
    for state in lived(strategy, losses):
        if len(state.trials) >= 2:
            ranked = sorted(state.trials, key=lambda trial: -trial.credit)
            best = ranked[: math.ceil(len(ranked) / 2)]
            mean = [sum(xs) / len(best) for xs in zip(*(trial.genome for trial in best), strict=True)]
            assert strategy.parent(state) == pytest.approx(mean)
    assert state.genome == pytest.approx(strategy.parent(state), abs=1e-6)


def final_gene(progress: Callable[[list[float]], float], fitness: str, seed: int, **settings: Any) -> float:
    """Where one gene is on average in the last third of a run whose progress depends on the genes in force so far."""
    strategy = strategy_of((Gene("x", 0.0, 1.0),), fitness=fitness, **settings)
    state, loss, noise = strategy.begin(), 10.0, torch.randn(300, generator=generator(seed, "noise")).tolist()
    history: list[float] = []
    for i in range(300):
        history.append(state.genome[0])  # with which connections change after the loss was measured
        state = strategy.after(state, loss, generator(seed, i))
        loss -= 0.02 / (1 + i / 30) * (1 + progress(history) + 0.2 * noise[i])
    return sum(history[200:]) / 100


@pytest.mark.parametrize("best", [0.1, 0.9])
def test_evolution_finds_the_better_region_and_the_placebo_does_not(best: float) -> None:
    def ends(fitness: str) -> list[float]:
        return [final_gene(lambda x: -abs(x[-1] - best), fitness, seed) for seed in range(8)]

    evolved, placebo = ends("progress"), ends("shuffled")
    assert sum(abs(x - best) for x in evolved) / 8 < 0.25
    assert sum(abs(x - best) for x in placebo) / 8 > 0.32
    assert sum(abs(e - best) < abs(p - best) for e, p in zip(evolved, placebo, strict=True)) >= 6


def test_gradients_are_averaged_over_the_window_of_the_genome_in_force() -> None:
    """Of one that looks at gradients; one step is a window like any other."""
    strategy = StrategyConfig(fitness="progress", genes={"window": (1.0, 8.0)})
    rule = build_rule(GenerationsConfig(every=100, random_share=0.5, strategy=strategy))
    assert isinstance(rule, Evolved)
    for place, steps in ((0.0, 1), (1.0, 8)):
        begun = rule.initial_state()
        state = dataclasses.replace(begun, strategy=dataclasses.replace(begun.strategy, genome=(place,)))
        assert rule.windows(["a"], state)["a"].steps == steps


def test_what_evolves_counts_in_the_steps_between_updates_as_they_are() -> None:
    """At least ten, of a share of a short run: for a ramp in updates, and for measurements every n-th update."""
    strategy = StrategyConfig(fitness="progress", genes={"ramp": (1.0, 1.5)}, damage=DamageConfig(every=2))
    rule, horizon = build_rule(GenerationsConfig(every="2%", strategy=strategy)), Horizon(250)
    state = rule.initial_state()
    assert isinstance(rule, Evolved)
    updates = rule.strategy.values(state.strategy)["ramp"]
    assert rule.ramp_in_force(state, horizon) == round(10 * updates)
    due = list(rule.updates(horizon))
    measured = [step for step in due if rule.candidates_scored(["a"], range(step, step + 1), horizon)]
    assert measured == due[1::2]
