"""The rules in training: the faults that others shipped, exact counts, real shrinking, and what is never allocated."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsae.config import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.cpu import native
from sparsae.kernels.probe import LargestGradients, Probe, SampledGradients
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.rules import EvolutionConfig, GmpConfig, GranetConfig, GseConfig, MagnitudeConfig, RiglConfig, SetConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.surgery import prepare_swap
from sparsae.train.memory import state_bytes
from tests.core.test_topology import assert_valid
from tests.support.loops import OPTIMIZERS, mlp, run_steps

KEEPING: dict[str, RuleConfig] = {
    "set": SetConfig(every=1, stop=1.0),
    "rigl": RiglConfig(every=1, stop=1.0),
    "rigl-sum": RiglConfig(every=1, stop=1.0, accumulate="sum"),
    "gse": GseConfig(every=1, stop=1.0),
    "gse-grabo": GseConfig(every=1, stop=1.0, sampling="grabo", scope="local"),
    "gse-graest": GseConfig(every=1, stop=1.0, sampling="graest", sample_ratio=3.0),
    "search-rigl": EvolutionConfig(every=1, stop=1.0, candidates=1, proposer="rigl"),
}
PRUNING: dict[str, RuleConfig] = {
    "gmp": GmpConfig(every=3),
    "gmp-global": GmpConfig(every=3, scope="global"),
    "granet": GranetConfig(every=3),
    "granet-local": GranetConfig(every=3, scope="local", accumulate="sum"),
    "magnitude": MagnitudeConfig(),
    "magnitude-local": MagnitudeConfig(scope="local"),
}
RULES = KEEPING | PRUNING


def make(
    name: str, steps: int, optimizer: str = "ours", unit: tuple[int, int] = (1, 1), teacher: str = "masked"
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    topology = RULES[name]
    start = topology.start_sparsity if isinstance(topology, GmpConfig | GranetConfig | MagnitudeConfig) else 0.8
    model = mlp(sparsity=start, unit=unit)
    made = OPTIMIZERS[optimizer](model)
    config = SparsifierConfig(
        steps=steps,
        topology=topology,
        teacher=TeacherConfig.model_validate({"storage": teacher}),
        sparsity=0.8 if name in PRUNING else None,
    )
    return model, made, Sparsifier(model, made, config)


@pytest.mark.parametrize("optimizer", ["ours", "sgd"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("name", KEEPING)
def test_no_update_changes_the_count_or_hands_down_anything_stale(
    name: str, unit: tuple[int, int], optimizer: str
) -> None:
    model, made, sparsifier = make(name, 61, optimizer, unit)
    layers = sparse_layers(model)
    nnz, moved = sparsifier.nnz, 0
    for step in range(60):
        x = torch.randn(8, 24, generator=generator(step, "x"))
        made.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        for p in model.parameters():
            # So that whatever is zero afterwards is new.
            p.grad = torch.randn(p.shape, generator=generator(step, str(tuple(p.shape)))).abs() + 1.0
        before = {layer: layers[layer].topology for layer in layers}
        sparsifier.before_step()
        made.step()
        kept = {
            layer: dict(zip(module.indices.tolist(), module.values.tolist(), strict=True))
            for layer, module in layers.items()
        }
        update = sparsifier.after_step()
        assert update is not None
        assert update.row["candidates"][0]["rejected"] is None
        assert sparsifier.nnz == nnz
        for layer, module in layers.items():
            assert_valid(module.topology)
            grown = ~before[layer].contains(module.indices)
            moved += int(grown.sum())
            tensors = [v for v in made.state[module.values].values() if isinstance(v, Tensor) and v.dim()]
            assert tensors
            for tensor in (module.values.detach(), *tensors):
                assert tensor.shape[0] == module.topology.count
                assert not tensor[grown].any()
                assert bool(tensor[~grown].flatten(1).any(1).all() if tensor.dim() > 1 else tensor[~grown].all())
            for u, v, is_new in zip(module.indices.tolist(), module.values.tolist(), grown.tolist(), strict=True):
                assert is_new or kept[layer][u] == v
    assert moved > 60


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_momentum_of_a_dropped_weight_revives_it(optimizer: str) -> None:
    """A mask beside a dense momentum lets a dropped weight return to where its momentum has moved it."""
    model = mlp()
    layers, made = sparse_layers(model), OPTIMIZERS[optimizer](model)
    layer = layers["0"]
    unit, other = layer.indices[:1].clone(), layer.topology.sample_inactive(1, generator(0))

    def step(gradient: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        made.step()

    for _ in range(5):
        step(10.0)
    prepare_swap(layers, Swap({"0": unit}, {"0": other}), "zero", generator(0)).commit(made)
    step(10.0)
    assert not bool(layer.topology.contains(unit).any())
    prepare_swap(layers, Swap({"0": other}, {"0": unit}), "zero", generator(0)).commit(made)
    step(0.0)
    assert float(layer.values[layer.topology.positions(unit)].detach()) == 0.0


@pytest.mark.parametrize("name", RULES)
def test_ties_break_the_same_way_every_time_and_by_index(name: str) -> None:
    def run() -> list[Tensor]:
        model, made, sparsifier = make(name, 24)
        for layer in sparse_layers(model).values():
            layer.values.data.fill_(0.5)
        for _ in range(18):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            sparsifier.before_step()
            sparsifier.after_step()
        assert made.state == {}
        return [layer.indices for layer in sparse_layers(model).values()]

    first, second = run(), run()
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    if name in ("gmp", "magnitude-local"):
        # The first of equals are dropped, so the last of the full layers are left.
        for indices, units in zip(first, (24 * 48, 48 * 24), strict=True):
            assert torch.equal(indices, torch.arange(units - indices.numel(), units, dtype=indices.dtype))


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("name", PRUNING)
def test_everything_shrinks_with_what_is_pruned(name: str, unit: tuple[int, int]) -> None:
    model, made, sparsifier = make(name, 40, unit=unit)
    layers, size = sparse_layers(model), unit[0] * unit[1]
    run_steps(model, made, sparsifier, 30)
    target = round(0.2 * (2 * 24 * 48 // size)) * size
    assert sparsifier.nnz == target
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert sparsifier.teacher is not None
    held = state_bytes(layers, made, sparsifier.teacher.layers)
    assert held["values"] == held["gradients"] == held["teacher"] == 4 * target
    assert held["optimizer"] == 12 * target
    for layer in layers.values():
        assert_valid(layer.topology)
        assert layer.values.untyped_storage().nbytes() == 4 * layer.topology.nnz


@pytest.mark.parametrize("storage", ["union", "dense"])
def test_other_teachers_follow_a_model_that_shrinks(storage: str) -> None:
    model, made, sparsifier = make("granet", 40, teacher=storage)
    assert sparsifier.teacher is not None
    run_steps(model, made, sparsifier, 40)
    assert sparsifier.teacher.nnz >= sparsifier.nnz
    for name, layer in sparse_layers(model).items():
        kept = sparsifier.teacher.layers[name].module
        if isinstance(kept, SparseLinear):
            assert bool(kept.topology.contains(layer.indices).all())


def test_global_pruning_keeps_every_layers_least() -> None:
    model, made, sparsifier = make("magnitude", 20)
    with torch.no_grad():
        sparse_layers(model)["0"].values.mul_(1e-6)
    run_steps(model, made, sparsifier, 20)
    # k_min is a quarter of the final density.
    first, second = (layer.topology for layer in sparse_layers(model).values())
    assert first.count == 58
    assert first.density >= 0.05
    assert first.count + second.count == round(0.2 * 2 * 24 * 48)


def test_settings_that_do_not_fit_are_named() -> None:
    def sparsifier(topology: RuleConfig, start: float, **settings: Any) -> Sparsifier:
        model = mlp(sparsity=start)
        return Sparsifier(model, OPTIMIZERS["sgd"](model), SparsifierConfig(steps=9, topology=topology, **settings))

    with pytest.raises(InputError, match="'gmp' prunes: set the sparsity where it ends"):
        sparsifier(GmpConfig(), 0.0)
    with pytest.raises(InputError, match=r"'rigl' keeps the model's sparsity: leave out sparsity 0\.9"):
        sparsifier(RiglConfig(), 0.8, sparsity=0.9)
    with pytest.raises(InputError, match=r"prunes to sparsity 0\.5: the model is sparser already"):
        sparsifier(MagnitudeConfig(), 0.8, sparsity=0.5)
    with pytest.raises(InputError, match=r"head_min_density 0\.1 needs heads"):
        sparsifier(GranetConfig(), 0.0, sparsity=0.5, head_min_density=0.1)


def look_inside(monkeypatch: pytest.MonkeyPatch, probe: type[Probe], mode: TorchDispatchMode) -> None:
    """A mode around a backward pass does not see what the sparse operator does; so enter it there too."""
    add = probe.add

    def watched(self: Probe, *arguments: Any) -> None:
        with mode:
            add(self, *arguments)

    monkeypatch.setattr(probe, "add", watched)


class _DenseGradients(TorchDispatchMode):
    """How many storages of a dense weight's size are alive at once."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.most, self.seen = sizes, 0, 0
        self._alive: list[tuple[int, weakref.ref[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for thing in tree_leaves(result):
            if isinstance(thing, Tensor) and thing.numel() in self.sizes and thing.is_floating_point():
                self.seen += 1
                self._alive = [(at, tensor) for at, tensor in self._alive if tensor() is not None]
                self._alive.append((thing.untyped_storage().data_ptr(), weakref.ref(thing)))
                self.most = max(self.most, len({at for at, _ in self._alive}))
        return result


@pytest.mark.parametrize(("accumulate", "expected"), [("last", 1), ("sum", 3)])
def test_rigl_holds_one_layers_dense_gradient_at_a_time(
    accumulate: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.absence() is not None:
        pytest.skip("the reference backend has a dense scratch matrix of its own")
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 50), nn.Linear(50, 30)), 0.9, backend="cpu")
    sizes = {40 * 70, 70 * 50, 50 * 30}
    made = OPTIMIZERS["sgd"](model)
    topology = RiglConfig.model_validate({"every": 1, "accumulate": accumulate})
    sparsifier = Sparsifier(model, made, SparsifierConfig(steps=9, topology=topology))
    watch = _DenseGradients(sizes)
    look_inside(monkeypatch, LargestGradients, watch)
    with watch:
        for _ in range(3):
            model(torch.randn(4, 40, generator=generator(1))).square().mean().backward()
            sparsifier.before_step()
            made.step()
            assert sparsifier.after_step() is not None
            made.zero_grad()
    assert watch.seen >= 9
    assert watch.most == expected


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize(("accumulate", "told"), [("last", 3), ("last", 1), ("sum", 3), ("sum", 1)])
def test_the_dense_gradients_are_those_of_a_dense_layer(accumulate: str, told: int, unit: tuple[int, int]) -> None:
    model, dense = mlp(unit=unit), densify(mlp(unit=unit))
    layers = sparse_layers(model)
    probes = {
        name: LargestGradients(layer.key, 9, accumulate, told)  # type: ignore[arg-type]
        for name, layer in layers.items()
    }
    for seed in range(3):  # the backward passes of one step
        x = torch.randn(8, 24, generator=generator(seed, "x"))
        if accumulate == "last":
            dense.zero_grad()
        for m in (model, dense):
            (m(x) - x).square().mean().backward()
    for name, layer in layers.items():
        probe, weight = probes[name], dense.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        probe.close()
        rows, columns = layer.topology.grid
        blocks = weight.grad.view(rows, unit[0], columns, unit[1]).square().sum((1, 3)).sqrt()
        magnitudes = blocks.T.reshape(-1)
        assert probe.active is not None
        torch.testing.assert_close(probe.active, magnitudes[layer.indices.long()])
        magnitudes[layer.indices.long()] = -1
        assert probe.units is not None
        assert probe.units.tolist() == magnitudes.topk(9).indices.sort().values.tolist()
        torch.testing.assert_close(probe.gradient, magnitudes[probe.units.long()])
        passes = 3 if accumulate == "sum" else 4 - told
        assert (probe.positions, probe.tokens) == (layer.topology.units - layer.topology.count, 8 * passes)


@pytest.mark.parametrize("sampling", ["uniform", "grabo", "graest"])
def test_gse_needs_no_more_than_its_connections(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose dense weight would take 40 GB."""
    if native.absence() is not None:
        pytest.skip("the reference backend computes densely")
    n = nnz = 100_000
    topology = Topology.random((n, n), nnz, generator(0))
    model = nn.Sequential(SparseLinear(topology, torch.randn(nnz, generator=generator(1)), backend="cpu"))
    made = OPTIMIZERS["sgd"](model)
    rule = GseConfig.model_validate({"every": 1, "sampling": sampling})
    sparsifier = Sparsifier(model, made, SparsifierConfig(steps=9, topology=rule))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
            return result

    tokens = 4
    look_inside(monkeypatch, SampledGradients, Largest())
    with Largest():
        for _ in range(2):
            model(torch.randn(tokens, n, generator=generator(2))).square().mean().backward()
            sparsifier.before_step()
            made.step()
            update = sparsifier.after_step()
            assert update is not None
            assert update.accepted
            made.zero_grad()
    assert sparsifier.nnz == nnz
    assert update.row["swaps"] > 10_000
    # Inputs, outputs and indices, and twice the units while they are compared: nothing grows with out times in.
    assert largest <= max(tokens * n, 3 * nnz)
