"""What others read as the `weight` of a layer, and what they trace."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from sparsae.core.randomness import generator
from sparsae.nn.linear import SparseLinear
from sparsae.nn.sparsify import densify, sparsify
from sparsae.nn.weight import DenseView


def layer_of(kind: str, unit: tuple[int, int] = (1, 1)) -> SparseLinear:
    torch.manual_seed(0)
    dense = Conv1D(32, 16) if kind == "conv1d" else nn.Linear(16, 32)
    layer = sparsify(nn.Sequential(dense), 0.8, unit=unit, seed=1)[0]  # type: ignore[index]
    assert isinstance(layer, SparseLinear)
    return layer


def dense_of(kind: str, unit: tuple[int, int] = (1, 1)) -> nn.Module:
    return densify(nn.Sequential(layer_of(kind, unit)))[0]  # type: ignore[index]


class _Counted(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_it_is_like_is_answered_without_building_it(kind: str) -> None:
    layer, dense = layer_of(kind), dense_of(kind)
    with _Counted() as counted:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert not isinstance(weight, nn.Parameter)
        assert weight.shape == dense.weight.shape  # type: ignore[union-attr]
        assert (weight.dtype, weight.device, weight.ndim, weight.numel()) == (
            torch.float32,
            layer.values.device,
            2,
            512,
        )
        assert (weight.size(0), len(weight), weight.dim()) == (*weight.shape[:1], *weight.shape[:1], 2)
        assert weight.requires_grad
        assert not weight.is_cuda
        assert weight.is_floating_point()
        assert torch.is_floating_point(weight)
        assert weight.data.dtype == torch.float32
        assert not weight.detach().requires_grad
        assert hash(weight) == hash(weight)
    assert counted.operations == 0
    layer.values.requires_grad_(False)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4), (2, 8)])
@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w,
        lambda w: w + 1,
        lambda w: w.T @ w,
        lambda w: torch.cat([w, w]),
        lambda w: nn.functional.linear(w, w),
        lambda w: w[1:, ::2],
        lambda w: w.float().norm(),
        lambda w: torch.stack([w, w]).sum(),
        lambda w: w.clone(),
        lambda w: w.view(-1)[3:50:7],
        lambda w: torch.broadcast_tensors(torch.ones(1), w[0])[0].clone(),
        lambda w: w.max(dim=1).values,
        lambda w: w.T[2:4].T,
        lambda w: w.data + 1,
    ],
)
def test_arithmetic_is_that_of_the_dense_weight(
    compute: Callable[[Tensor], Tensor], unit: tuple[int, int], kind: str
) -> None:
    layer, dense = layer_of(kind, unit), dense_of(kind, unit)
    got, want = compute(layer.weight) * 1, compute(dense.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want * 1)
    assert type(got) is Tensor
    if want.requires_grad:
        got.square().sum().backward()
        want.square().sum().backward()
        weight_OI = dense.weight.grad.T if kind == "conv1d" else dense.weight.grad  # type: ignore[union-attr]
        twin = SparseLinear(layer.topology, layer.values.detach())
        (b_out, b_in), (rows, columns) = unit, layer.topology.grid
        blocks = weight_OI.reshape(rows, b_out, columns, b_in)
        row, column = twin.topology.rows.long(), twin.topology.columns.long()
        torch.testing.assert_close(layer.values.grad, blocks[row, :, column, :].reshape(layer.values.shape))


WRITES: dict[str, Callable[[SparseLinear], object]] = {
    "mul_": lambda m: m.weight.mul_(2),
    "+=": lambda m: operator.iadd(m.weight, 1),
    "[]": lambda m: operator.setitem(m.weight, 0, 0),
    "data": lambda m: m.weight.data.zero_(),
    "detach": lambda m: m.weight.detach().add_(1),
    "data =": lambda m: setattr(m.weight, "data", torch.zeros(1)),
    "slice": lambda m: m.weight[0].zero_(),
    "transposed": lambda m: m.weight.T.mul_(0),
    "row": lambda m: next(iter(m.weight)).fill_(1),
    "parts": lambda m: m.weight.chunk(2)[1].add_(1),
    "view": lambda m: m.weight.view(-1)[3:].zero_(),
    "same dtype": lambda m: m.weight.float().zero_(),
    "init": lambda m: nn.init.normal_(m.weight),
    "kaiming": lambda m: nn.init.kaiming_uniform_(m.weight),
    "out": lambda m: torch.mul(m.weight, 2, out=m.weight),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2),
    "copy_": lambda m: m.weight.copy_(torch.zeros(32, 16)),
    "requires_grad_": lambda m: m.weight.requires_grad_(False),
    "requires_grad": lambda m: setattr(m.weight, "requires_grad", False),
    "parameter": lambda m: nn.Parameter(m.weight),
    "assignment": lambda m: setattr(m, "weight", torch.zeros(32, 16)),
    "new parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(32, 16))),
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_writing_raises(write: str, mode: type) -> None:
    layer = layer_of("linear")
    before = layer.values.detach().clone()
    with mode(), pytest.raises((RuntimeError, AttributeError, KeyError, TypeError)) as raised:
        WRITES[write](layer)
    told = str(raised.value)
    assert "weight" in told
    if write not in ("new parameter", "prune"):  # torch's own words
        assert "values" in told
    assert torch.equal(layer.values, before)
    assert isinstance(layer.weight, DenseView)


def test_other_tensors_are_written_from_it() -> None:
    layer = layer_of("linear")
    target = torch.zeros(32, 16)
    with torch.no_grad():
        target.copy_(layer.weight)
    assert torch.equal(target, layer.dense_weight())
    with torch.no_grad():
        assert torch.equal(torch.mul(layer.weight, 1, out=torch.empty(32, 16)), target)


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_traced_follows_its_input(grad: bool) -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), 0.8)
    x, other = (torch.randn(5, 16, generator=generator(seed)) for seed in (1, 2))
    with torch.set_grad_enabled(grad), pytest.warns(DeprecationWarning, match="jit.trace"):
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(other), model(other))
    # Nothing of this package is in it.
    assert "sparsae::" not in str(traced.inlined_graph)


def test_a_layer_is_exported_before_its_first_forward_pass() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), 0.8)
    x = torch.randn(5, 16)
    exported = torch.export.export(model, (x,)).module()
    other = torch.randn(5, 16)
    torch.testing.assert_close(exported(other), model(other))


def test_modes_and_transforms_see_the_product() -> None:
    layer = layer_of("linear")
    x = torch.randn(5, 16)
    with torch.no_grad(), _Counted() as counted:
        layer(x)
    assert counted.operations
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    other = torch.randn(5, 16)
    torch.testing.assert_close(graph(other), layer(other).detach())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_dense_weights_lie_in_memory_as_those_of_dense_layers(unit: tuple[int, int], kind: str) -> None:
    layer, dense = layer_of(kind, unit), dense_of(kind, unit)
    assert layer.dense_weight().is_contiguous()
    assert dense.weight.is_contiguous()  # type: ignore[operator, union-attr]
    assert (layer.weight * 1).is_contiguous()
