"""Whoever writes a layer's indices: another topology is followed or refused, and never half used."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.registry import BACKENDS
from sparsae.kernels.structures import poisoned, same_indices
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from tests.nn.test_sparsify import gpt2

REFUSED = r"written in place.*load_state_dict.*set_topology.*teacher"
HERE = [name for name, b in BACKENDS.items() if b.refusal((1, 1), torch.device("cpu"), torch.float32) is None]


def net(seed: int, backend: str = "auto", unit: tuple[int, int] = (1, 1), sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
    return sparsify(model, sparsity, backend=backend, unit=unit, seed=seed, budget="uniform")


def dense(model: nn.Module, x: Tensor) -> Tensor:
    return densify(copy.deepcopy(model))(x)


def same(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-5)


# Ways in which another model's state comes into a layer: {name: (one, other) -> None}.
def _copy_in_place(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            mine.copy_(theirs)


def _through_data(one: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        mine.data.copy_(theirs.data)  # leaves no trace in the version counter


def _average(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            mine.copy_(mine * 0.9 + theirs * 0.1)


def _swap(one: nn.Module, other: nn.Module) -> None:
    for name, layer in sparse_layers(one).items():
        torch.utils.swap_tensors(layer.indices, sparse_layers(other)[name].indices)


@pytest.mark.parametrize("mode", ["train", "no_grad", "inference"])
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("write", [_copy_in_place, _through_data, _average, _swap])
def test_another_topology_written_in_place_is_refused(
    write: Callable[[nn.Module, nn.Module], None], backend: str, mode: str
) -> None:
    one, other = net(1, backend), net(2, backend)
    x = torch.randn(5, 24)
    one(x), other(x)
    write(one, other)
    context = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context(), pytest.raises(InputError, match=REFUSED):
        one(x)
    with pytest.raises(InputError, match=REFUSED):
        next(iter(sparse_layers(one).values())).dense_weight()


@pytest.mark.parametrize("write", [_copy_in_place, _through_data])
def test_equal_indices_written_in_place_pass(write: Callable[[nn.Module, nn.Module], None]) -> None:
    one, other = net(1), net(1)
    with torch.no_grad():
        for layer in sparse_layers(other).values():
            layer.values.mul_(2)
    write(one, other)
    x = torch.randn(5, 24)
    assert same(one(x), dense(other, x))


def test_writing_after_a_forward_pass_does_not_reach_its_backward_pass() -> None:
    one, other = net(1), net(1)
    x = torch.randn(5, 24)
    loss, expected = one(x).square().sum(), other(x).square().sum()
    for layer in sparse_layers(one).values():
        layer.indices.data.fill_(0)
    loss.backward()
    expected.backward()
    for name, layer in sparse_layers(one).items():
        assert layer.values.grad is not None
        assert torch.equal(layer.values.grad, sparse_layers(other)[name].values.grad)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("sparsity", [0.8, 0.7])
def test_a_loaded_state_is_followed(assign: bool, sparsity: float) -> None:
    one, other = net(1), net(2, sparsity=sparsity)
    x = torch.randn(5, 24, requires_grad=True)
    one(x)
    one.load_state_dict(other.state_dict(), assign=assign)
    assert same(one(x), dense(other, x))
    one(x).sum().backward()
    assert x.grad is not None


def test_another_models_state_in_a_functional_call_is_followed() -> None:
    one = net(1)
    x = torch.randn(5, 24)
    for other in (net(2), net(3, sparsity=0.7), net(1)):
        state = other.state_dict()
        assert same(functional_call(one, state, (x,)), dense(other, x))
        with torch.no_grad():
            assert same(functional_call(one, state, (x,)), dense(other, x))
        assert same(one(x), dense(one, x))
    only_values = {name: t for name, t in net(3, sparsity=0.7).state_dict().items() if "values" in name}
    with pytest.raises(ValueError, match="the layer's topology wants"):
        functional_call(one, only_values, (x,))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i: i.flip(0), "not sorted"),
        (lambda i: i + 10**6, r"must lie in \[0,"),
        (lambda i: torch.cat([i[:1], i[:-1]]), "unique"),
        (lambda i: i.float(), "torch.float32"),
        (lambda i: i[:, None], "shape"),
    ],
)
def test_what_is_no_topology_is_refused(damage: Callable[[Tensor], Tensor], message: str) -> None:
    layer = sparse_layers(net(1))["0"]
    bad = damage(layer.indices)
    x = torch.randn(5, 24)
    with pytest.raises(InputError, match=message):
        functional_call(layer, {"indices": bad}, (x,))
    with pytest.raises(InputError, match=message):
        layer.load_state_dict({**layer.state_dict(), "indices": bad})
    layer.indices = bad
    with pytest.raises(InputError, match=message):
        layer(x)


@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_model_is_right_while_the_topology_stays_and_refused_afterwards(buffers: bool) -> None:
    model = net(1)
    averaged = AveragedModel(model, use_buffers=buffers)
    x = torch.randn(5, 24)
    for _ in range(2):
        averaged.update_parameters(model)
        assert same(averaged(x), dense(model, x))
    layer = sparse_layers(model)["0"]
    layer.set_topology(Topology.random((48, 24), layer.topology.count, generator(9)), layer.values.data)
    averaged.update_parameters(model)
    with pytest.raises(InputError, match=REFUSED):
        averaged(x)


@given(st.integers(0, 50), st.integers(0, 50), st.sampled_from([torch.int32, torch.int64, torch.float32]))
def test_index_tensors_are_compared_by_what_they_hold(n: int, m: int, dtype: torch.dtype) -> None:
    one, other = torch.arange(n, dtype=torch.int32), torch.arange(m, dtype=dtype)
    assert same_indices(one, other) == (n == m and dtype != torch.float32)
    assert same_indices(one.repeat_interleave(2)[::2], one)
    if n:
        changed = one.clone()
        changed[n // 2] += 1
        assert not same_indices(one, changed)


def test_a_device_that_is_not_waited_for_gets_nan() -> None:
    values, indices = torch.ones(3), torch.tensor([1, 4, 6], dtype=torch.int32)
    assert torch.equal(poisoned(values, indices.clone(), indices), values)
    assert bool(poisoned(values, indices + 1, indices).isnan().all())
    with pytest.raises(InputError, match=REFUSED):
        poisoned(values, indices[:2], indices)


@pytest.mark.parametrize("through", ["pickle", "torch.save", "deepcopy"])
def test_what_kernels_derive_does_not_travel(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(1)
    x = torch.randn(5, 24)
    expected = model(x)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        # As on a machine that has no native kernels.
        data = io.BytesIO()
        torch.save(model, data) if through == "torch.save" else pickle.dump(model, data)
        data.seek(0)
        monkeypatch.setattr(BACKENDS["cpu"], "refusal", lambda *_: "it is Sunday")
        twin = torch.load(data, weights_only=False) if through == "torch.save" else pickle.load(data)
        assert {layer.kernel for layer in sparse_layers(twin).values()} == {"reference"}
    assert same(twin(x), expected)
    mine, theirs = sparse_layers(model)["0"], sparse_layers(twin)["0"]
    shared = {t.data_ptr() for t in mine.index_tensors if t.numel()} & {t.data_ptr() for t in theirs.index_tensors}
    assert not shared


@pytest.mark.parametrize("convert", ["double", "bfloat16", "to", "type", "to_empty"])
def test_conversions_keep_a_layer_whole(convert: str) -> None:
    model, x = net(1), torch.randn(5, 24)
    expected = model(x)
    if convert == "to_empty":
        empty = net(1).to_empty(device="meta").to_empty(device="cpu")
        empty.load_state_dict(model.state_dict())
        assert same(empty(x), expected)
        return
    dtype = {"bfloat16": torch.bfloat16}.get(convert, torch.float64)
    move = {"to": lambda: model.to(dtype), "type": lambda: model.type(dtype)}.get(
        convert, getattr(model, convert, None)
    )
    assert move is not None
    move()
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), expected, rtol=0.05, atol=0.05)
    assert sparse_layers(model)["0"].indices.dtype == torch.int32


def test_gradients_of_a_replaced_topology_are_refused() -> None:
    model, x = net(1), torch.randn(5, 24)
    layer = sparse_layers(model)["0"]
    loss = model(x).sum()
    layer.set_topology(Topology.random((48, 24), layer.topology.count, generator(9)), layer.values.data.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(x).sum().backward()


def test_gradients_of_a_dense_weight_whose_topology_was_replaced_are_refused() -> None:
    layer = sparse_layers(net(1))["0"]
    loss = (layer.weight * torch.randn(48, 24)).sum()
    layer.set_topology(Topology.random((48, 24), layer.topology.count, generator(9)), layer.values.data.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    layer.weight.sum().backward()
    assert torch.equal(layer.values.grad, torch.ones_like(layer.values))


@pytest.mark.parametrize("dense_weight", [False, True])
def test_gradients_of_a_topology_that_was_tried_are_refused_afterwards(dense_weight: bool) -> None:
    model, x = net(1), torch.randn(5, 24)
    layer = sparse_layers(model)["0"]
    other = Topology.random((48, 24), layer.topology.count, generator(9))
    with layer.trying(other, torch.randn(other.count)):
        losses = [(layer.weight if dense_weight else model(x)).square().sum() for _ in range(2)]
        losses[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


def test_trying_a_topology_leaves_an_old_loss_alone() -> None:
    model, x = net(1), torch.randn(5, 24)
    layer = sparse_layers(model)["0"]
    before, y = layer.topology, model(x)
    loss = y.sum()
    other = Topology.random((48, 24), layer.topology.count + 7, generator(9))
    with layer.trying(other, torch.randn(other.count)):
        assert same(model(x), dense(model, x))
        assert not torch.equal(model(x), y)
    assert layer.topology is before
    assert torch.equal(model(x), y)
    loss.backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", HERE)
def test_a_forward_pass_sees_one_topology_whatever_other_threads_do(backend: str, grad: bool) -> None:
    topologies = [Topology.random((64, 64), count, generator(count)) for count in (300, 301, 900)]
    values = [torch.randn(t.count, generator=generator(1)) for t in topologies]
    x = torch.randn(16, 64, generator=generator(2))
    layer = SparseLinear(topologies[0], values[0].clone(), backend=backend)
    expected = []
    for topology, v in zip(topologies, values, strict=True):
        layer.set_topology(topology, v.clone())
        expected.append(layer(x).detach())
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                with torch.set_grad_enabled(grad):
                    y = layer(x).detach()
                if not any(torch.allclose(y, want, atol=1e-5) for want in expected):
                    wrong.append(y)
        except BaseException as error:
            wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(600):
        layer.set_topology(topologies[number % 3], values[number % 3].clone())
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_a_fused_mlp_looks_at_its_indices_too() -> None:
    model = sparsify(gpt2(), 0.95, seed=1)
    tokens = torch.randint(10, (2, 8), generator=generator(0))
    model(tokens)
    layer = next(layer for name, layer in sparse_layers(model).items() if name.endswith("mlp.c_fc"))
    layer.indices.data.add_(1)
    with pytest.raises(InputError, match=REFUSED):
        model(tokens)


def test_values_that_are_loaded_for_the_same_topology_change_nothing_else() -> None:
    model, x = net(1), torch.randn(5, 24)
    state = copy.deepcopy(model.state_dict())
    model(x).sum().backward()
    layer = sparse_layers(model)["0"]
    key, gradient = int(layer.key), layer.values.grad
    layer.values.data.zero_()
    model.load_state_dict(state)
    assert torch.equal(layer.values, state["0.values"])
    assert gradient is not None
    assert layer.values.grad is gradient
    assert int(layer.key) == key


def test_a_layer_on_the_meta_device_takes_over_what_it_is_assigned() -> None:
    model, x = net(1), torch.randn(5, 24)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x), model(x))


def test_compiled_code_that_reads_the_weight_looks_at_the_indices() -> None:
    model, x = net(1), torch.randn(5, 24)
    layer = sparse_layers(model)["0"]
    compiled = torch.compile(lambda x: x @ layer.weight.T, backend="aot_eager", fullgraph=True)
    assert same(compiled(x), x @ layer.dense_weight().T)
    _copy_in_place(model, net(2))
    assert bool(compiled(x).isnan().all())
