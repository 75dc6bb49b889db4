"""Convolutions as sparse layers: what they compute, how density is shared out, and a ResNet-20 that trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsae import AdamW, Sparsifier, SparsifierConfig, densify, sparse_layers, sparsify, summary
from sparsae.core.budgets import relative_density
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.nn.pruning import prunable
from sparsae.rules.rigl import RiglConfig
from sparsae.rules.set import SetConfig
from tests.support.masked_twin import require_equal
from tests.support.resnet import ResNet20

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"padding": 1, "bias": False},
    {"stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": (3, 2), "dilation": (2, 1), "padding": "same"},
    {"kernel_size": 4, "padding": "same"},
    {"padding": "valid", "stride": 2},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": 1, "stride": 2, "padding_mode": "circular"},
    {"kernel_size": 1, "stride": 2},
]


def convolution(**arguments: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | arguments)).double()


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # of the dense twin
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_a_convolution_computes_what_its_dense_twin_does(arguments: dict[str, Any]) -> None:
    model = sparsify(convolution(**arguments), 0.6)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    twin = require_equal(model, lambda m: (m(x).sin() * m(x)).sum())
    assert vars(twin[0]).keys() == vars(convolution(**arguments)[0]).keys()  # type: ignore[index]
    assert repr(twin) == repr(convolution(**arguments))
    for inputs in (x, x[0], x[:0], x.to(memory_format=torch.channels_last)):
        got, want = model(inputs), twin(inputs)
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride() or not got.numel()
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))


def test_what_the_weight_of_a_convolution_is_can_be_read() -> None:
    model = sparsify(convolution(), 0.5)
    layer, dense = model[0], densify(copy.deepcopy(model))[0]  # type: ignore[index]
    assert layer.weight.shape == dense.weight.shape == (6, 4, 3, 3)
    assert torch.equal(layer.weight + 0, dense.weight)
    assert "kernel_size=(3, 3)" in repr(layer)
    with pytest.raises(RuntimeError, match="to be read"):
        layer.weight.zero_()


@pytest.mark.parametrize("unit", [(1, 1), (2, 9)])
@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_active_weights_of_a_convolution_stay(unit: tuple[int, int], start: Any) -> None:
    model = sparsify(convolution(), 0.5, unit=unit, start=start)
    mask, dense = model[0].topology.to_mask(), convolution()[0].weight  # type: ignore[index,union-attr]
    assert torch.equal(model[0].weight + 0, dense * mask.view(6, 4, 3, 3))  # type: ignore[index]


def test_an_optimizer_follows_a_convolution_both_ways() -> None:
    model = convolution()
    model.to(memory_format=torch.channels_last)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    adam.step()
    moment = adam.state[model[0].weight]["exp_avg"].clone()
    sparsify(model, 0.5, optimizer=adam)
    mask = model[0].topology.to_mask().view(6, 4, 3, 3)  # type: ignore[union-attr]
    densify(model, optimizer=adam)
    assert adam.param_groups[0]["params"] == [model[0].weight, model[0].bias]
    assert torch.equal(adam.state[model[0].weight]["exp_avg"], moment * mask)


def test_masks_and_pruning_take_a_convolution_whose_channels_lie_last() -> None:
    model, same = convolution(), convolution()
    model.to(memory_format=torch.channels_last)
    mask = torch.rand(6, 4, 3, 3, generator=generator(0, "mask")) < 0.5
    for each in (model, same):
        sparsify(each, start={"0": mask})
    assert torch.equal(sparse_layers(model)["0"].values, sparse_layers(same)["0"].values)
    pruned = convolution().to(memory_format=torch.channels_last)
    weight = pruned.get_parameter("0.weight")
    before = weight.detach().clone()
    prunable({"0": pruned.get_submodule("0")})[0].prune(100)
    assert int((weight == 0).sum()) == 100
    assert torch.equal(weight, before * (weight != 0))


def test_channels_that_do_not_fit_are_named() -> None:
    model = sparsify(convolution(), 0.5)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\): it must be \(N, 4, height, width\)"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))


def test_erk_counts_the_dimensions_of_kernels() -> None:
    """RigL's paper: 1 - (n_in + n_out + w + h) / (n_in n_out w h) is the sparsity, up to the common factor."""
    model = sparsify(ResNet20(), 0.9)
    densities = {name: layer.topology.density for name, layer in sparse_layers(model).items()}
    free = {name: density for name, density in densities.items() if density < 1.0}
    assert any(density == 1.0 for density in densities.values())
    ratios = [
        density / relative_density("erk", dense.weight.shape)
        for name, density in free.items()
        if (dense := ResNet20().get_submodule(name))
    ]
    assert max(ratios) / min(ratios) == pytest.approx(1.0, abs=0.01)


def test_grouped_and_other_convolutions_stay_dense_and_are_named() -> None:
    class Own(nn.Conv2d):
        """Somebody's."""

    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(8, 8, 3), nn.Conv1d(8, 8, 3), Own(8, 8, 3), nn.Conv2d(8, 8, 1)
    )
    report = summary(sparsify(model, 0.5))
    assert {row.name: row.reason for row in report.dense if row.kind != "bias"} == {
        "0": "a grouped convolution",
        "1": "convolution",
        "2": "convolution",
        "3": "a subclass of nn.Conv2d of another kind (Own)",
    }
    assert "a grouped convolution" in str(report)
    assert [row.shape for row in report.sparse] == [(8, 8, 1, 1)]
    with pytest.raises(InputError, match="no layer to sparsify: 1 a grouped convolution"):
        sparsify(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), 0.5)


def test_a_resnet_has_the_gradients_of_its_masked_twin() -> None:
    torch.manual_seed(0)
    model = sparsify(ResNet20(), 0.9).double()
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5, 7, 2])
    require_equal(model, lambda m: functional.cross_entropy(m(x), labels))


@pytest.mark.parametrize("topology", [RiglConfig(every=3), SetConfig(every=3)], ids=["rigl", "set"])
def test_a_resnet_trains_with_exact_nnz_while_connections_move(topology: Any) -> None:
    torch.manual_seed(0)
    dense = ResNet20()
    weights = sum(m.weight.numel() for m in dense.modules() if isinstance(m, nn.Conv2d))
    model = sparsify(dense, 0.9, seed=1)
    assert len(sparse_layers(model)) == 21
    assert not any(isinstance(module, nn.Conv2d) for module in model.modules())
    adam = AdamW(model.parameters(), lr=3e-3)
    sparsifier = Sparsifier(model, adam, SparsifierConfig(steps=9, topology=topology))
    before = {name: layer.topology.to_mask() for name, layer in sparse_layers(model).items()}
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    losses = []
    for _ in range(9):
        loss = functional.cross_entropy(model(x), labels)
        adam.zero_grad()
        loss.backward()
        sparsifier.before_step()
        adam.step()
        sparsifier.after_step()
        losses.append(float(loss.detach()))
        assert sparsifier.nnz == round(0.1 * weights)
    assert losses[-1] < 0.7 * losses[0]
    moved = [n for n, layer in sparse_layers(model).items() if not torch.equal(layer.topology.to_mask(), before[n])]
    assert len(moved) > 15

    model.eval()
    with torch.no_grad():
        wanted = model(x)
        again = sparsify(ResNet20(), 0.9, seed=2).eval()
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(x), wanted)
        plain = ResNet20().eval()
        plain.load_state_dict(densify(model).state_dict())
        torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-5)
