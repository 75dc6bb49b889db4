"""Gradients at connections that do not exist, however a backward pass gets to a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.kernels.probe import LargestGradients, Probe, SampledGradients
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.rules import EvolutionConfig, GseConfig, RiglConfig
from sparsae.search.sparsifier import Sparsifier

WIDTH, HIDDEN = 24, 48


class Net(nn.Module):
    """A block that is passed through `times`, inside `through`: a shared layer where that is more than once."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.times = times
        self.through: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.through(self.block, x)
        return x


@contextmanager
def _plain() -> Iterator[None]:
    yield


WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[], object]]] = {
    "plain": (lambda block, x: block(x), _plain),
    "checkpoint": (lambda block, x: checkpoint(block, x, use_reentrant=False), _plain),
    "reentrant": (lambda block, x: checkpoint(block, x, use_reentrant=True), _plain),
    "offload": (lambda block, x: block(x), save_on_cpu),
    "copies": (lambda block, x: block(x), lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone())),
    "weight": (lambda block, x: _by_weights(block, x), _plain),
}


def _by_weights(block: nn.Module, x: Tensor) -> Tensor:
    one, two = block[0], block[2]  # type: ignore[index]
    hidden = nn.functional.gelu(nn.functional.linear(x, one.weight, one.bias))
    return hidden @ two.weight.T + two.bias


def _batch(seed: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=generator(seed, "probes")).requires_grad_()


def _dense_gradients(model: Net, seeds: list[int]) -> dict[str, Tensor]:
    """Of every layer, over all positions in the order of units."""
    twin = densify(sparsify(Net(model.times), 0.8, seed=1))
    for seed in seeds:
        twin(_batch(seed)).square().mean().backward()
    return {name: twin.get_submodule(name).weight.grad.T.reshape(-1) for name in sparse_layers(model)}  # type: ignore


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of checkpoint, in the validation
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["sampled", "last", "sum"])
def test_they_are_those_of_a_dense_model(kind: str, way: str, times: int) -> None:
    through, context = WAYS[way]
    model = sparsify(Net(times), 0.8, seed=1)
    assert isinstance(model, Net)
    model.through = through
    layers = sparse_layers(model)
    probes: dict[str, Probe] = {}
    for name, layer in layers.items():
        topology = layer.topology
        units = topology.sample_inactive(topology.units - topology.count, generator(0))
        probes[name] = (
            SampledGradients(layer.key, units)
            if kind == "sampled"
            else LargestGradients(layer.key, units.numel(), kind, passes=2)  # type: ignore[arg-type]
        )
    for seed in (1, 2):
        with context():  # type: ignore[attr-defined]
            loss = model(_batch(seed)).square().mean()
        loss.backward()
        model.eval()
        with torch.no_grad():
            model(_batch(3))  # a validation in between
        model.train()
    expected = _dense_gradients(model, [2] if kind == "last" else [1, 2])
    for name, probe in probes.items():
        probe.close()
        assert probe.units is not None
        want = expected[name][probe.units.long()]
        assert bool(want.any())
        assert probe.gradient is not None
        torch.testing.assert_close(probe.gradient, want if kind == "sampled" else want.abs(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", ["forwards first", "one sum"])
def test_the_last_pass_counts_in_any_order_of_forward_and_backward(order: str) -> None:
    model = sparsify(Net(2), 0.8, seed=1)
    assert isinstance(model, Net)
    layers = sparse_layers(model)
    summed = order == "one sum"
    passes = 1 if summed else 2
    probes = {name: LargestGradients(layer.key, 10, "last", passes) for name, layer in layers.items()}
    losses = [model(_batch(seed)).square().mean() for seed in (1, 2)]
    if summed:
        (losses[0] + losses[1]).backward()
    else:
        for loss in losses:
            loss.backward()
    expected = _dense_gradients(model, [1, 2] if summed else [2])
    for name, probe in probes.items():
        probe.close()
        assert probe.units is not None
        torch.testing.assert_close(probe.gradient, expected[name][probe.units.long()].abs())


def test_a_layers_dense_gradient_is_gone_when_its_last_call_was_answered() -> None:
    model = sparsify(Net(3), 0.8, seed=1)
    probes = [LargestGradients(layer.key, 5, "last") for layer in sparse_layers(model).values()]
    with torch.no_grad():
        model.eval()(_batch(0))
    model.train()
    model(_batch(1)).square().mean().backward()
    assert all(probe._sum is None and probe.gradient is not None for probe in probes)


RULES = {
    "evolution": EvolutionConfig(every=1, stop=1.0),
    "rigl": RiglConfig(every=1, stop=1.0),
    "gse": GseConfig(every=1),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_probe_that_nobody_answered_is_an_error_and_an_idle_layer_is_none(rule: str) -> None:
    model = sparsify(Net(1), 0.8, seed=1)
    model.idle = sparsify(nn.Sequential(nn.Linear(WIDTH, WIDTH)), 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10, topology=RULES[rule]))
    model(_batch(0)).square().mean().backward()
    sparsifier.before_step()  # idle: no gradient at all
    optimizer.step()
    update = sparsifier.after_step()
    assert update is not None
    optimizer.zero_grad(set_to_none=False)
    model(_batch(1)).square().mean().backward()
    sparsifier.before_step()  # idle: a gradient of zeros
    optimizer.step()
    sparsifier.after_step()
    optimizer.zero_grad()
    layer = model.get_submodule("block.0")
    assert isinstance(layer, SparseLinear)
    layer.set_topology(layer.topology, layer.values.data.clone())
    model(_batch(2)).square().mean().backward()
    with pytest.raises(InputError, match=r"layer block\.0 got a gradient .* none at inactive connections"):
        sparsifier.before_step()


def test_too_few_backward_passes_are_told() -> None:
    model = sparsify(Net(1), 0.8, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10, topology=RULES["rigl"], accumulation=3))
    model(_batch(0)).square().mean().backward()
    with pytest.raises(InputError, match=r"fewer than the 3 backward passes of SparsifierConfig\.accumulation"):
        sparsifier.before_step()


def test_many_small_passes_in_half_precision_add_up() -> None:
    model = sparsify(nn.Sequential(nn.Linear(WIDTH, HIDDEN)), 0.9, seed=0)
    layer, x = sparse_layers(model)["0"], torch.randn(4, WIDTH, generator=generator(1, "x"))
    units = layer.topology.sample_inactive(20, generator(0, "units"))
    found = {}
    for passes in (1, 600):
        probe = SampledGradients(layer.prepare().structures[0], units, layer.values, lambda _: True)
        for _ in range(passes):
            with torch.autocast("cpu", torch.bfloat16):
                model(x).sum().backward()
        probe.close()
        assert probe.gradient is not None
        found[passes] = probe.gradient.float()
    torch.testing.assert_close(found[600], 600 * found[1], rtol=1e-5, atol=1e-5)
