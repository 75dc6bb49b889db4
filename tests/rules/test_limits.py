"""Every rule, found by the registry, keeps neurons and heads inside their limits while it chooses, and still moves."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsae import HeadLayout, Sparsifier, SparsifierConfig, sparse_layers, sparsify
from sparsae.config import ParameterizationConfig
from sparsae.core.groups import Groups, binding
from sparsae.core.observation import LayerView, Observation
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.nn.limits import Limits
from sparsae.parameterization import Parameterization
from sparsae.registry import RULES
from sparsae.rules import ResetConfig, SetConfig, build_rule
from sparsae.rules.parts.choose import keeps_limits, pruned, within_limits
from sparsae.rules.parts.proposers import PROPOSERS, Guidance, reset
from tests.support.loops import OPTIMIZERS, frequent, run_steps, score_of

STEPS, EVERY, SPARSITY = 18, 3, 0.8
HEADS = {"0": HeadLayout("out", 12), "2": HeadLayout("in", 12)}
LIMITS = {
    "constant fan-in": Limits(0.0, (1.0, 1.0)),
    "constant fan-out": Limits(0.0, None, (1.0, 1.0)),
    "bounded fan-in": Limits(0.0, (0.7, 1.4)),
    "heads": Limits(0.17),
    "everything": Limits(0.12, (0.8, 1.3), (0.4, 1.8)),
}
SCOPES = {"gse local": ("gse", {"scope": "local"}), "gmp global": ("gmp", {"scope": "global"})}
SCOPES |= {f"evolution {name}": ("evolution", {"proposer": name}) for name in PROPOSERS}
RULE_CASES = {**{name: (name, {}) for name in RULES.names()}, **SCOPES}


def trained(case: str, limits: Limits, unit: tuple[int, int]) -> tuple[Sparsifier, list[dict[str, Topology]], int]:
    """A training, the topologies after each of its updates, and how many units they moved."""
    name, given_settings = RULE_CASES[case]
    settings = RULES[name].settings.model_validate({**frequent(name, EVERY), **given_settings})
    start = settings.first_sparsity if settings.first_sparsity is not None else SPARSITY
    asked = {"head_min_density": limits.head_min_density, "fan_in": limits.fan_in, "fan_out": limits.fan_out}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
    sparsify(model, start, unit=unit, heads=HEADS, seed=1, **asked)
    config = SparsifierConfig(
        steps=STEPS,
        topology=settings,
        sparsity=None if settings.first_sparsity is None else SPARSITY,
        **asked,
    )
    sparsifier = Sparsifier(
        model,
        OPTIMIZERS["ours"](model),
        config,
        score=score_of(model) if build_rule(settings).micro_batch else None,  # type: ignore[arg-type]
        heads=HEADS,
        parameterization=Parameterization(ParameterizationConfig(), 24, 1),
    )
    seen, moved = [], 0
    update = sparsifier.search.update

    def watch(step: int, stepped: bool = True) -> object:
        nonlocal moved
        found = update(step, stepped)
        if found is not None:
            seen.append({name: layer.topology for name, layer in sparse_layers(model).items()})
            moved += sum(row["swaps"] for row in found.row["candidates"]) // max(1, len(found.row["candidates"]))
            assert all(row["rejected"] is None for row in found.row["candidates"])
        return found

    sparsifier.search.update = watch  # type: ignore[method-assign,assignment]
    run_steps(model, sparsifier._optimizer, sparsifier, STEPS)
    return sparsifier, seen, moved


@pytest.mark.parametrize(
    ("limits", "unit"), [*((name, (1, 1)) for name in LIMITS), *((name, (2, 2)) for name in ("heads", "everything"))]
)
@pytest.mark.parametrize("case", RULE_CASES)
def test_no_update_leaves_the_limits(case: str, limits: str, unit: tuple[int, int]) -> None:
    sparsifier, seen, moved = trained(case, LIMITS[limits], unit)
    rule, first = sparsifier.search.rule, sparsifier.search.gradients.groups
    assert rule.moves == (moved > 0)
    for topologies in seen:
        for name, topology in topologies.items():
            groups = first[name]
            if rule.prunes:
                # Of partitions that cross, what is left can keep the one with the least freedom.
                groups = tuple(binding([part.at(topology.count) for part in groups])[:1])
            for part in groups:
                counts = part.counts(topology.indices)
                assert int(counts.min()) >= part.least
                assert int(counts.max()) <= part.most
    end = round((1 - SPARSITY) * 2 * 24 * 48 / (unit[0] * unit[1]))
    assert sum(topology.count for topology in seen[-1].values()) == end if seen else not rule.moves


@given(st.integers(0, 2**32), st.sampled_from(sorted(PROPOSERS)), st.sampled_from(sorted(LIMITS)), st.floats(0.02, 1.0))
def test_every_proposal_obeys_and_is_nearly_as_large_as_asked(
    seed: int, proposer: str, limits: str, rate: float
) -> None:
    observation = observe(LIMITS[limits], seed)
    count = max(1, round(rate * observation.count))
    raw = PROPOSERS[proposer](observation, count, Guidance(1.0, 1.0), generator(seed))
    swap = within_limits(observation, raw, generator(seed, "obey"))
    check(observation, swap)
    if limits == "constant fan-in" and proposer in ("uniform", "layerwise") and rate < 0.5:
        # What "uniform" moves from layer to layer is what a constant fan-in cannot take.
        assert swap.size >= (0.7 * raw.size if proposer == "layerwise" else 1)
    if keeps_limits(observation.layers, raw):
        assert swap is raw


@given(st.integers(0, 2**32), st.sampled_from(sorted(LIMITS)))
def test_resets_obey(seed: int, limits: str) -> None:
    observation = observe(LIMITS[limits], seed)
    for redraw in (0.0, 1.0):
        name, raw = reset(observation, ResetConfig(redraw=redraw), generator(seed))
        if name == "redraw":
            assert keeps_limits(observation.layers, raw)
        swap = within_limits(observation, raw, generator(seed, "obey"))
        check(observation, swap)
        assert set(swap.count_changes().values()) <= {0}


def observe(limits: Limits, seed: int) -> Observation:
    """Layers near their bounds, whose topologies are inside the limits."""
    model = nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24))
    heads = {"0": HeadLayout("out", 12), "1": HeadLayout("in", 12)}
    asked = {"head_min_density": limits.head_min_density, "fan_in": limits.fan_in, "fan_out": limits.fan_out}
    sparsify(model, SPARSITY, heads=heads, seed=seed % 5, **asked)
    views = {}
    for name, layer in sparse_layers(model).items():
        topology, rng = layer.topology, generator(seed, name)
        sample = topology.sample_inactive(topology.count, rng)
        views[name] = LayerView(
            topology,
            torch.randn(topology.count, generator=rng),
            (topology.count - 5, topology.count + 5),
            limits.groups(topology.shape, topology.unit, topology.count, heads[name]),
            sample=sample,
            sample_gradient=torch.randn(sample.numel(), generator=rng),
            active_gradient=torch.rand(topology.count, generator=rng),
            ends=(topology.count, topology.count // 2),
        )
    return Observation(views, 25, 100)


def check(observation: Observation, swap: Swap) -> None:
    assert swap.size == sum(units.numel() for units in swap.grow.values())
    assert keeps_limits(observation.layers, swap)
    for name, view in observation.layers.items():
        empty = view.topology.indices[:0]
        view.topology.replace(swap.drop.get(name, empty), swap.grow.get(name, empty))  # refuses what is no swap


@given(st.integers(0, 2**32), st.floats(0.0, 1.0), st.sampled_from([(1.0, 1.0), (0.6, 1.5)]))
def test_pruning_keeps_one_partition_exactly(seed: int, share: float, fan: tuple[float, float]) -> None:
    topology = Topology.random((12, 20), 150, generator(seed, "test"))
    before = Groups.of_neurons(topology.grid, "in", fan, topology.count)
    view = LayerView(topology, torch.ones(150), (1, 240), (before,))
    n = round(share * 150)
    scores = torch.rand(150, generator=generator(seed, "scores"))
    at = pruned(view, scores, n)
    assert at.numel() == n
    left = topology.replace(topology.indices[at], topology.indices[:0])[0]
    now, counts = before.at(left.count), before.counts(left.indices)
    started = before.counts(topology.indices)
    # A row that had too few to begin with keeps all; that may leave others more than they shall have.
    assert bool((counts >= torch.minimum(started, torch.tensor(now.least))).all())
    missing = int((now.least - started).clamp(min=0).sum()) + int((started - before.most).clamp(min=0).sum())
    assert int(counts.max()) <= now.most or missing


def test_granet_regenerates_within_its_neurons() -> None:
    _, seen, _ = trained("granet", Limits(0.0, (1.0, 1.0)), (1, 1))
    assert len({topologies["0"].count for topologies in seen}) > 2
    for topologies in seen:
        counts = torch.bincount(topologies["0"].rows.long(), minlength=48)
        assert int(counts.max()) - int(counts.min()) <= 1
    changed = [
        int((~after["0"].contains(before["0"].indices)).sum()) > before["0"].count - after["0"].count
        for before, after in itertools.pairwise(seen)
    ]
    assert any(changed)  # more were dropped than pruned: others were grown


def test_a_resumed_run_has_the_limits_that_it_began_with() -> None:
    sparsifier, _, _ = trained("evolution", Limits(0.0, (0.7, 1.4)), (1, 1))
    again, _, _ = trained("evolution", Limits(0.0, (0.7, 1.4)), (1, 1))
    state = sparsifier.state_dict()
    state = {**state, "initial_densities": dict.fromkeys(state["initial_densities"], 0.5)}
    again.load_state_dict(state)
    assert again.search.gradients.groups["0"][0].most == 17  # ceil(1.4 * 0.5 * 24)


def test_where_nothing_can_move_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    both = Limits(0.0, (1.0, 1.0), (1.0, 1.0))  # 230.4 units of 48 rows: to within one, so that some can move
    with caplog.at_level(logging.WARNING):
        _, _, moved = trained("set", both, (1, 1))
        assert moved
        assert not caplog.messages
        model = sparsify(nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24)), 0.75, fan_in=(1, 1), fan_out=(1, 1))
        Sparsifier(
            model,
            OPTIMIZERS["sgd"](model),
            SparsifierConfig(steps=10, topology=SetConfig(every=2), fan_in=(1.0, 1.0), fan_out=(1.0, 1.0)),
        )
    assert "every neuron and of every input in 2 layers, such as 0" in caplog.messages[0]
