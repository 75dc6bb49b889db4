"""One update of the topology: probes, scores, choice, bounds, burn-in."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.randomness import generator
from sparsae.kernels.probe import SampledGradients, open_probe
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.rules import EvolutionConfig, ProxyConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.telemetry import TopologyTelemetry
from tests.support.loops import OPTIMIZERS, frequent, mlp, run_steps, score_of


@pytest.mark.parametrize("scope", ["new", "all"])
def test_burn_in_moves_what_it_says(scope: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = EvolutionConfig.model_validate(
        {
            "every": 1,
            "candidates": 1,
            "initialization": "kaiming_uniform",
            "burn_in": {"steps": 2, "multiplier": 1.5, "scope": scope},
        }
    )
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=100, topology=topology))
    run_steps(model, optimizer, sparsifier, 1)
    assert sparsifier.burning_in
    new = {name: mask.clone() for name, mask in sparsifier._burn_in.new.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(8, 24, generator=generator(1, "burn-in"))
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    sparsifier.search.capture = lambda *of_step: None  # type: ignore[method-assign]
    sparsifier.before_step()
    optimizer.step()
    sparsifier._burn_in.after_step()
    for name, p in model.named_parameters():
        layer = name.removesuffix(".values")
        factor = torch.full_like(p, 0.0 if scope == "new" else 1.0)
        if layer in new:
            factor[new[layer]] = 1.5
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * factor * gradients[name])


@pytest.mark.parametrize("activity", ["candidate", "training", "moments"])
def test_every_activity_source_scores(activity: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS["ours"](model)
    topology = EvolutionConfig.model_validate(
        {"every": 1, "candidates": 2, "proxy": {"terms": {"activity": {"source": activity}}}}
    )
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10, topology=topology), score=score_of(model))  # type: ignore[arg-type]
    x = torch.randn(8, 24, generator=generator(5, "x", 0))
    (model(x) - x).square().mean().backward()
    sparsifier.before_step()
    optimizer.step()
    update = sparsifier.after_step()
    assert update is not None
    rows = [update.row["current"], *update.row["candidates"]]
    assert all(row["activity"] > 0 and math.isfinite(row["score"]) for row in rows)
    assert update.cost.forwards == 3
    assert update.cost.backwards == (3 if activity == "candidate" else 0)


def test_the_candidate_that_scores_best_is_taken() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model)
    topology = EvolutionConfig.model_validate({"every": 1, "candidates": 4, "mutation_rate": 0.5})
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10, topology=topology), score=score_of(model))  # type: ignore[arg-type]
    x = torch.randn(8, 24, generator=generator(5, "x", 0))
    (model(x) - x).square().mean().backward()
    sparsifier.before_step()
    optimizer.step()
    update = sparsifier.after_step()
    assert update is not None
    scores = [row["score"] for row in update.row["candidates"]]
    chosen = update.row["chosen"]
    assert scores[chosen] == min(scores)
    with torch.no_grad():
        loss = float(score_of(model)(1))  # type: ignore[operator]
    assert loss == pytest.approx(update.row["candidates"][chosen]["cross_entropy"], rel=1e-6)


def test_sampled_gradients_are_those_of_a_dense_layer() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model)
    sparsifier = Sparsifier(
        model, optimizer, SparsifierConfig(steps=20, topology=EvolutionConfig(every=1, candidates=1))
    )
    probes = sparsifier.search.gradients.probes
    dense = densify(mlp())
    for seed in (1, 2):  # Gradients of two passes add up, as in accumulation.
        x = torch.randn(8, 24, generator=generator(seed, "x"))
        for m in (model, dense):
            (m(x) - x).square().mean().backward()
    for name, layer in sparse_layers(model).items():
        gradient = dense.get_submodule(name).weight.grad
        assert isinstance(gradient, Tensor)
        expected = gradient.T.reshape(-1)[probes[name].units.long()]
        torch.testing.assert_close(probes[name].gradient, expected)
        assert not bool(layer.topology.contains(probes[name].units).any())


def test_a_probe_dies_with_whoever_asked_and_belongs_to_one_layer_with_one_topology() -> None:
    layer, other = sparse_layers(mlp()).values()
    probe = SampledGradients(layer.key, layer.topology.sample_inactive(3, generator(0)))
    key = layer.key
    assert open_probe(key.clone()) is probe
    assert open_probe(other.key) is None
    assert open_probe(copy.deepcopy(layer).key) is None
    layer.set_topology(layer.topology, layer.values.data)
    assert open_probe(layer.key) is None
    del probe
    gc.collect()
    assert open_probe(key) is None


def test_scoring_is_not_watched() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model)
    topology = EvolutionConfig(
        every=1, candidates=3, proxy=ProxyConfig.model_validate({"terms": {"activity": {"source": "candidate"}}})
    )
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=topology), score=score_of(model))  # type: ignore[arg-type]
    x = torch.randn(8, 24, generator=generator(1, "x"))
    (model(x) - x).square().mean().backward()
    probes = sparsifier.search.gradients.probes
    seen = {name: probe.gradient for name, probe in probes.items()}
    assert seen
    sparsifier.before_step()
    optimizer.step()
    update = sparsifier.after_step()
    assert update is not None
    assert update.cost.backwards == 4
    assert all(probes[name].gradient is gradient for name, gradient in seen.items())
    assert {tokens for _, tokens in update.cost.probed.values()} == {8}


def test_compiled_models_are_probed_and_follow_every_count() -> None:
    torch._dynamo.reset()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topology = EvolutionConfig(every=1, candidates=1, stop=1.0)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=topology))
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(12):
            x = torch.randn(8, 24, generator=generator(step, "x"))
            (compiled(x) - x).square().mean().backward()
            assert all(probe.gradient is not None for probe in sparsifier.search.gradients.probes.values())
            sparsifier.before_step()
            optimizer.step()
            sparsifier.after_step()
            optimizer.zero_grad()
            layers = sparse_layers(model)
            # Counts drift as under a rule that moves density between layers.
            for layer in layers.values():
                grown = layer.topology.sample_inactive(1, generator(step, "drift"))
                topology_, _ = layer.topology.replace(layer.indices[:0], grown)
                layer.set_topology(topology_, torch.randn(topology_.count))
            sparsifier.search.arm(sparsifier.step + 1)
            sparsifier.search.telemetry = TopologyTelemetry(layers, {})


def test_scoring_gives_every_module_its_own_mode_back() -> None:
    torch.manual_seed(0)
    frozen = nn.BatchNorm1d(24).eval()
    model = nn.Sequential(nn.Linear(24, 24), frozen, nn.Linear(24, 24), nn.Linear(24, 24))
    model[3].requires_grad_(True)
    sparsify(model, 0.5)
    optimizer = OPTIMIZERS["sgd"](model)

    def score(step: int) -> Tensor:
        assert not model.training
        return model[2](model[1](model[0](torch.ones(4, 24)))).square().mean()

    topology = EvolutionConfig(every=1, candidates=2)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10, topology=topology), score=score)
    score_free = model[0](torch.ones(4, 24)).sum()
    score_free.backward()
    sparsifier.before_step()
    optimizer.step()
    update = sparsifier.after_step()
    assert update is not None
    assert model.training
    assert not frozen.training


def test_a_layer_that_starts_outside_its_bounds_keeps_them_over_a_stop() -> None:
    def make() -> Sparsifier:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4))
        sparsify(model, 0.9, budget="erk")
        config = SparsifierConfig(steps=10, topology=EvolutionConfig(candidates=1), max_density=0.11)
        return Sparsifier(model, OPTIMIZERS["sgd"](model), config)

    one, two = make(), make()
    one.search.bounds = dict.fromkeys(one.search.bounds, (1, 7))
    two.load_state_dict(one.state_dict())
    assert two.search.bounds == one.search.bounds


def test_head_floors_hold_under_evolution() -> None:
    torch.manual_seed(0)
    heads = {"0": HeadLayout("out", 8)}
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsify(model, 0.7, heads=heads, head_min_density=0.25, seed=0)
    optimizer = OPTIMIZERS["sgd"](model)
    topology = EvolutionConfig.model_validate(
        {"every": 1, "candidates": 1, "proposer": "uniform", "mutation_rate": 0.05, "stop": 1.0}
    )
    config = SparsifierConfig(steps=60, topology=topology, head_min_density=0.25, min_density=0.0, max_density=1.0)
    sparsifier = Sparsifier(model, optimizer, config, heads=heads)
    from sparsae.core.observation import head_densities

    for _ in range(50):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        assert float(head_densities(sparse_layers(model)["0"].topology, heads["0"]).min()) >= 0.25


@pytest.mark.parametrize("rule", ["generations", "rigl", "gmp", "evolution"])
def test_rows_tell_what_sets_of_connections_tell(rule: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS["ours"](model)
    score = score_of(model) if rule == "evolution" else None
    ends = {"sparsity": 0.95} if rule == "gmp" else {}
    config = SparsifierConfig(steps=30, topology={"rule": rule} | frequent(rule, 3), **ends)
    sparsifier = Sparsifier(model, optimizer, config, score=score)  # type: ignore[arg-type]
    layers = sparse_layers(model)

    def now() -> set[tuple[str, int]]:
        return {(name, unit) for name, layer in layers.items() for unit in layer.indices.tolist()}

    start = ever = before = now()
    born: dict[tuple[str, int], int] = dict.fromkeys(start, 0)
    rows: list[dict[str, Any]] = []
    for step in range(1, 31):
        optimizer.zero_grad()
        (model(torch.ones(8, 24)) - 1).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        if (update := sparsifier.after_step()) is not None:
            rows.append(update.row)
            active = now()
            born = {unit: born.get(unit, step) if unit in before else step for unit in active}
            ever, row, ages = ever | active, rows[-1], sorted(step - birth for birth in born.values())
            assert row["hamming_start"] == pytest.approx(len(active - start) / len(active))
            assert row["hamming_last"] == pytest.approx(len(active - before) / len(active))
            assert row["itop_rate"] == pytest.approx(len(ever) / sum(layer.topology.units for layer in layers.values()))
            assert row["age"]["mean"] == pytest.approx(sum(ages) / len(ages))
            assert (row["age"]["median"], row["age"]["max"]) == (ages[(len(ages) - 1) // 2], ages[-1])
            before = active
        if step == 15:
            sparsifier.load_state_dict(copy.deepcopy(sparsifier.state_dict()))
    assert len(rows) > 3
