"""The Sparsifier in somebody's own loop: exactness over many updates, sparse memory, burn-in, resuming."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsae.config.sparsifier import TOLD, SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.kernels.reference import SCRATCH
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.rules import EvolutionConfig, GenerationsConfig, SetConfig, StaticConfig
from sparsae.search.sparsifier import Sparsifier
from tests.core.test_topology import assert_valid
from tests.support.loops import OPTIMIZERS, mlp, run_steps, score_of


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_three_lines_train_a_model(name: str, unit: tuple[int, int]) -> None:
    model = mlp(unit=unit)
    optimizer = OPTIMIZERS[name](model)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=200))
    before = sparsifier.nnz
    losses = run_steps(model, optimizer, sparsifier, 200)
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    assert sparsifier.nnz == before
    start = {name: layer.indices.clone() for name, layer in sparse_layers(mlp(unit=unit)).items()}
    assert any(not torch.equal(layer.indices, start[name]) for name, layer in sparse_layers(model).items())


@pytest.mark.parametrize("proposer", ["uniform", "layerwise", "guided", "shift"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_hundreds_of_updates_keep_every_invariant(proposer: str, unit: tuple[int, int]) -> None:
    update_many_times(proposer, unit, 150)


def update_many_times(proposer: str, unit: tuple[int, int], updates: int) -> None:
    """Exact nnz, sorted unique indices, bounds, and no stale state anywhere, after each update."""
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
            **({"sample_ratio": 0.5} if proposer == "guided" else {}),
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
    sparsifier.search._scoring.score = lambda *_: _constant_score()  # type: ignore[method-assign]
    nnz = sparsifier.nnz
    accepted = 0
    for step in range(updates):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator(step, str(tuple(p.shape)))) + 2.0
        for probe in sparsifier.search.gradients.probes.values():  # gradients by hand reach no probe
            assert probe.units is not None
            probe.gradient = torch.zeros(probe.units.numel(), *next(iter(layers.values())).values.shape[1:])
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
    return {"cross_entropy": 1.0, "diversity": 0.0, "activity": 0.0}


@pytest.fixture
def frozen() -> Iterator[None]:
    """`gc.get_objects` shows what is made from here on: the thousands of objects of other tests take seconds a walk."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
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
            # By type: isinstance would wake the deprecated proxies that torch keeps, and the tensors that its compiler
            # traced with, which other tests may leave behind, have no memory to look at.
            is_large = type(thing) in (Tensor, nn.Parameter) and thing.numel() >= dense
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
    assert len(SCRATCH.buffers()) <= 1  # none where native kernels compute


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


def test_a_teacher_without_dense_parameters() -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), 0.5)
    optimizer = OPTIMIZERS["sgd"](model)
    config = SparsifierConfig(steps=5, topology=StaticConfig(), teacher=TeacherConfig())
    sparsifier = Sparsifier(model, optimizer, config)
    model(torch.ones(2, 8)).sum().backward()
    sparsifier.before_step()
    optimizer.step()
    sparsifier.after_step()


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


def test_a_setting_without_effect_is_refused_with_the_reason() -> None:
    for settings, said in (
        ({"topology": GenerationsConfig(window=5)}, "topology.window: has no effect: random_share is 1"),
        ({"rules": {"0": SetConfig(ramp_first=True)}}, "rules.0.ramp_first: has no effect: ramp is 0"),
        ({"teacher": TeacherConfig(enabled=False, beta=0.9)}, "teacher.beta: has no effect: teacher.enabled is false"),
    ):
        with pytest.raises(InputError, match=said):
            SparsifierConfig(steps=10, **settings)  # type: ignore[arg-type]
        SparsifierConfig.model_validate({"steps": 10, **settings}, context=TOLD)
    # A value that is the default's says nothing.
    SparsifierConfig(steps=10, topology=GenerationsConfig(window=1))


def test_the_name_of_a_rule_is_no_rule() -> None:
    with pytest.raises(InputError, match=r"topology: must be the settings of a rule, such as GmpConfig\(\), not 'gmp'"):
        SparsifierConfig(steps=3, topology="gmp")


@pytest.mark.parametrize(
    ("here", "told"),
    [
        ({}, []),
        ({"steps": 60}, []),  # a longer training
        ({"steps": 8}, ["of step 10, and the schedules end at steps=8"]),
        ({"topology": SetConfig(every=7, drop_fraction=0.9)}, ["topology.every 7 (was 4), topology.drop_fraction 0.9"]),
        ({"min_density": 0.1}, ["from here on: min_density 0.1 (was null)"]),
    ],
)
def test_a_state_of_other_settings_is_taken_and_told(
    here: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"steps": 40, "topology": SetConfig(every=4)}
    model = mlp()
    optimizer = OPTIMIZERS["ours"](model)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(**settings))
    run_steps(model, optimizer, sparsifier, 10)
    state = sparsifier.state_dict()
    caplog.clear()
    again = Sparsifier(model, optimizer, SparsifierConfig(**{**settings, **here}))
    again.load_state_dict(state)
    assert again.step == 10
    assert len(caplog.messages) == len(told)
    assert all(words in message for words, message in zip(told, caplog.messages, strict=True))
    caplog.clear()
    del state["settings"]  # as an earlier version wrote it
    again.load_state_dict(state)
    assert [message for message in caplog.messages if "settings" in message] == []
