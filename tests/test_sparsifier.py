"""The Sparsifier in somebody's own loop: exactness over many updates, sparse memory, burn-in, resuming."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsae.config.schema import EvolutionConfig, StaticConfig, TeacherConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.kernels.reference import SCRATCH
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.optim import AdamW, parameter_groups
from sparsae.train.sparsifier import Sparsifier, SparsifierConfig
from sparsae.train.telemetry import TopologyTelemetry
from tests.test_topology import assert_valid


def mlp(width: int = 24, sparsity: float = 0.8, unit: tuple[int, int] = (1, 1)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    return sparsify(model, sparsity, unit=unit, seed=1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, steps: int) -> list[float]:
    losses = []
    width = next(iter(sparse_layers(model).values())).in_features
    for _ in range(steps):
        x = torch.randn(8, width, generator=generator(5, "x", sparsifier.step))
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        losses.append(float(loss.detach()))
    return losses


def score_of(model: nn.Module) -> object:
    def score(step: int) -> Tensor:
        x = torch.randn(
            8, next(iter(sparse_layers(model).values())).in_features, generator=generator(9, "held out", step)
        )
        return (model(x) - x.roll(1, 1)).square().mean()

    return score


OPTIMIZERS = {
    "ours": lambda model: AdamW(parameter_groups(model, 0.1), lr=3e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_three_lines_train_a_model(name: str, unit: tuple[int, int]) -> None:
    model = mlp(unit=unit)
    optimizer = OPTIMIZERS[name](model)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=200))
    before = sparsifier.nnz
    losses = train(model, optimizer, sparsifier, 200)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert sparsifier.nnz == before
    start = {name: layer.indices.clone() for name, layer in sparse_layers(mlp(unit=unit)).items()}
    assert any(not torch.equal(layer.indices, start[name]) for name, layer in sparse_layers(model).items())


@pytest.mark.parametrize("proposer", ["uniform", "layerwise", "guided", "shift"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_thousands_of_updates_keep_every_invariant(proposer: str, unit: tuple[int, int]) -> None:
    """10,000 updates over the eight cases: exact nnz, sorted unique indices, bounds, and no stale state anywhere."""
    updates = 1250
    model = mlp(16, 0.75, unit)
    layers = sparse_layers(model)
    optimizer = OPTIMIZERS["ours"](model)
    topology = EvolutionConfig.model_validate(
        {
            "every": 1,
            "stop": 1.0,
            "proposer": proposer,
            "mutation_rate": 0.2,
            "mutation_schedule": "constant",
            "reset": {"probability": 0.05},
            "candidates": 1,
            "sample_ratio": 0.5,
        }
    )
    config = SparsifierConfig(
        steps=updates + 1, topology=topology, teacher=TeacherConfig(storage="union"), min_density=0.1, max_density=0.6
    )
    sparsifier = Sparsifier(
        model,
        optimizer,
        config,
        score=lambda step: torch.zeros(()),
    )
    sparsifier.search._measure = lambda plan, views, step: _constant_score()  # type: ignore[method-assign]
    nnz = sparsifier.nnz
    accepted = 0
    for step in range(updates):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator(step, str(tuple(p.shape)))) + 2.0
        before = {name: layer.topology for name, layer in layers.items()}
        sparsifier.before_step()
        optimizer.step()
        update = sparsifier.after_step()
        assert update is not None
        accepted += update.accepted
        assert sparsifier.nnz == nnz
        for name, layer in layers.items():
            assert_valid(layer.topology)
            assert 0.1 <= layer.topology.density <= 0.6
            grown = ~before[name].contains(layer.indices)
            state = optimizer.state[layer.values]
            for tensor in (layer.values.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]):
                assert tensor.shape[0] == layer.topology.count
                # Gradients are far from zero, so whatever is zero is new, and whatever is new is zero.
                assert not tensor[grown].any()
            assert bool((state["step"][~grown] > 0).all())
            assert sparsifier.teacher is not None
            union = sparsifier.teacher.layers[name].module
            assert isinstance(union, SparseLinear)
            assert_valid(union.topology)
            assert bool(union.topology.contains(layer.indices).all())
    assert accepted > 0.9 * updates


def _constant_score():  # type: ignore[no-untyped-def]
    from sparsae.rules.base import Score

    return Score(1.0, 0.0, 0.0)


def test_nothing_of_a_dense_layers_size_survives_a_step() -> None:
    """Live tensors are walked between all phases of steps with updates, scores and a teacher."""
    width = 64
    model = mlp(width, 0.9)
    optimizer = OPTIMIZERS["ours"](model)
    topology = EvolutionConfig(every=2, stop=1.0)
    config = SparsifierConfig(steps=8, topology=topology, teacher=TeacherConfig(storage="union"))
    sparsifier = Sparsifier(model, optimizer, config, score=score_of(model))  # type: ignore[arg-type]
    dense = 2 * width * width
    seen: list[str] = []

    def walk(phase: str) -> None:
        gc.collect()
        scratch = {buffer.untyped_storage().data_ptr() for buffer in SCRATCH.buffers()}
        for thing in gc.get_objects():
            # By type: isinstance would wake the deprecated proxies that torch keeps.
            is_large = issubclass(type(thing), Tensor) and thing.numel() >= dense
            if is_large and thing.untyped_storage().data_ptr() not in scratch:
                pytest.fail(f"a tensor of shape {tuple(thing.shape)} is alive {phase}")
        seen.append(phase)

    # Few tokens, so that no activation is as large as a dense weight.
    x = torch.randn(4, width, generator=generator(1, "x"))
    with _EveryResultIsSmall(dense):
        for _ in range(6):
            y = model(x)
            walk("after forward")
            y.square().mean().backward()
            walk("after backward")
            sparsifier.before_step()
            optimizer.step()
            walk("after the optimizer's step")
            update = sparsifier.after_step()
            walk("after a topology update" if update else "after a step without update")
            optimizer.zero_grad()
    assert "after a topology update" in seen
    assert len(SCRATCH.buffers()) == 1


class _EveryResultIsSmall(TorchDispatchMode):
    """Looks at the result of every operation, those inside a phase included."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        scratch = {buffer.untyped_storage().data_ptr() for buffer in SCRATCH.buffers()}
        for thing in tree_leaves(result):
            if isinstance(thing, Tensor) and thing.numel() >= self.size:
                assert thing.untyped_storage().data_ptr() in scratch, f"{func} made a tensor of a dense weight's size"
        return result


def test_a_dense_weight_would_be_found() -> None:
    """The criterion of the test above can fail: a dense layer's gradient is found out by it."""
    model = densify(mlp(64, 0.9))
    with pytest.raises(AssertionError, match="dense weight's size"), _EveryResultIsSmall(2 * 64 * 64):
        model(torch.ones(4, 64)).square().mean().backward()


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
    train(model, optimizer, sparsifier, 1)
    assert sparsifier.burning_in
    new = {name: mask.clone() for name, mask in sparsifier._burn_in.new.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(8, 24, generator=generator(1, "burn-in"))
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    sparsifier.search.capture = lambda step: None  # type: ignore[method-assign]
    sparsifier.before_step()
    optimizer.step()
    sparsifier._burn_in.after_step()
    for name, p in model.named_parameters():
        layer = name.removesuffix(".values")
        factor = torch.full_like(p, 0.0 if scope == "new" else 1.0)
        if layer in new:
            factor[new[layer]] = 1.5
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * factor * gradients[name])


def test_an_interrupted_sparsifier_goes_on_as_if_it_had_not_been() -> None:
    topology = EvolutionConfig.model_validate(
        {"every": 4, "burn_in": {"steps": 3}, "reset": {"probability": 0.3}, "adaptation": {"enabled": True}}
    )
    config = SparsifierConfig(steps=40, topology=topology, teacher=TeacherConfig(storage="union"))

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = mlp()
        optimizer = OPTIMIZERS["ours"](model)
        return model, optimizer, Sparsifier(model, optimizer, config, score=score_of(model))  # type: ignore[arg-type]

    model, optimizer, sparsifier = make()
    train(model, optimizer, sparsifier, 17)
    from sparsae.train.checkpoint import load_model, load_optimizer, model_tensors, optimizer_tensors

    assert sparsifier.teacher is not None
    saved = [
        {name: t.detach().clone() for name, t in tensors.items()}
        for tensors in (
            model_tensors(model),
            optimizer_tensors(model, optimizer),
            model_tensors(sparsifier.teacher.model),
            sparsifier.state()[1],
        )
    ]
    plain = sparsifier.state()[0]
    expected = train(model, optimizer, sparsifier, 23)
    again, optimizer_again, sparsifier_again = make()
    assert sparsifier_again.teacher is not None
    load_model(again, saved[0])
    load_optimizer(again, optimizer_again, saved[1])
    load_model(sparsifier_again.teacher.model, saved[2])
    sparsifier_again.teacher.reconnect(again)
    sparsifier_again.restore(plain, saved[3])
    assert train(again, optimizer_again, sparsifier_again, 23) == expected
    for name, tensor in model_tensors(model).items():
        assert torch.equal(tensor, model_tensors(again)[name])
    for name, tensor in model_tensors(sparsifier.teacher.model).items():
        assert torch.equal(tensor, model_tensors(sparsifier_again.teacher.model)[name])


@pytest.mark.parametrize("activity", ["candidate", "training", "moments"])
def test_every_activity_source_scores(activity: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS["ours"](model)
    topology = EvolutionConfig.model_validate({"every": 1, "candidates": 2, "proxy": {"activity": activity}})
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
    probes = sparsifier.search._probes
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


def test_scoring_is_not_watched() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model)
    topology = EvolutionConfig(every=1, candidates=3)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20, topology=topology), score=score_of(model))  # type: ignore[arg-type]
    x = torch.randn(8, 24, generator=generator(1, "x"))
    (model(x) - x).square().mean().backward()
    probes = sparsifier.search._probes
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
            assert all(probe.gradient is not None for probe in sparsifier.search._probes.values())
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


def test_a_teacher_without_dense_parameters() -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), 0.5)
    optimizer = OPTIMIZERS["sgd"](model)
    config = SparsifierConfig(steps=5, topology=StaticConfig(), teacher=TeacherConfig())
    sparsifier = Sparsifier(model, optimizer, config)
    model(torch.ones(2, 8)).sum().backward()
    sparsifier.before_step()
    optimizer.step()
    sparsifier.after_step()


def test_a_layer_that_starts_outside_its_bounds_keeps_them_over_a_stop() -> None:
    def make() -> Sparsifier:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4))
        sparsify(model, 0.9, budget="erk")
        config = SparsifierConfig(steps=10, topology=EvolutionConfig(candidates=1), max_density=0.11)
        return Sparsifier(model, OPTIMIZERS["sgd"](model), config)

    one, two = make(), make()
    one.search.bounds = dict.fromkeys(one.search.bounds, (1, 7))
    two.restore(*one.state())
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
    from sparsae.rules.base import head_densities

    for _ in range(50):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        assert float(head_densities(sparse_layers(model)["0"].topology, heads["0"]).min()) >= 0.25


def test_misuse_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="no sparse layer"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=1))
    sparsify(model, 0.5)
    with pytest.raises(InputError, match="build it after sparsify"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="elitist"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=1, topology=EvolutionConfig(selection="elitist")))
    Sparsifier(model, optimizer, SparsifierConfig(steps=1, topology=StaticConfig()))
