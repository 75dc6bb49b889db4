"""Every backend against a dense layer with a fixed mask, in output and every gradient, judged in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import BACKENDS, choose_backend
from sparsae.nn.linear import SparseLinear
from tests.support.strategies import topologies

CPU = torch.device("cpu")
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, backend in BACKENDS.items()
    for dtype in (torch.float32, torch.float64)
    if backend.refusal((1, 1), CPU, dtype) is None
]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}


def random_layer(
    topology: Topology, bias: bool, seed: int, dtype: torch.dtype = torch.float64, backend: str = "reference"
) -> SparseLinear:
    rng = generator(seed, "layer")
    values = torch.randn(topology.values_shape, generator=rng, dtype=dtype)
    vector = torch.randn(topology.shape[0], generator=rng, dtype=dtype) if bias else None
    return SparseLinear(topology, values, vector, backend=backend)


def serves(backend: str, topology: Topology, dtype: torch.dtype) -> bool:
    """Whether the backend takes such units: one may be for single weights only."""
    return BACKENDS[backend].refusal(topology.unit, CPU, dtype) is None


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """The result of a computation in `dtype` against the same in float64."""
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def at_units(weight_OI: Tensor, topology: Topology) -> Tensor:
    """The naive gather: one unit after the other."""
    (b_out, b_in) = topology.unit
    blocks = [
        weight_OI[r * b_out : (r + 1) * b_out, c * b_in : (c + 1) * b_in]
        for r, c in zip(topology.rows.tolist(), topology.columns.tolist(), strict=True)
    ]
    return torch.stack(blocks).reshape(topology.values_shape) if blocks else weight_OI.new_zeros(topology.values_shape)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@given(topologies(), st.booleans(), st.integers(0, 9), st.integers(0, 2**32))
def test_layer_equals_a_masked_dense_layer(
    backend: str, dtype: torch.dtype, topology: Topology, bias: bool, tokens: int, seed: int
) -> None:
    assume(serves(backend, topology, dtype))
    layer = random_layer(topology, bias, seed, dtype, backend)
    x = torch.randn(tokens, topology.shape[1], dtype=dtype, generator=generator(seed, "x")).requires_grad_()
    dy = torch.randn(tokens, topology.shape[0], dtype=dtype, generator=generator(seed, "dy"))
    weight = layer.dense_weight()
    assert torch.equal(weight != 0, topology.to_mask())
    assert torch.equal(at_units(weight, topology), layer.values.detach())
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact_bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(exact_x, exact_weight, exact_bias)
    inputs = [exact_x, exact_weight] + ([exact_bias] if exact_bias is not None else [])
    dx, dw, *db = torch.autograd.grad(expected, inputs, dy.double())
    y = layer(x)
    mine = [x, layer.values] + ([layer.bias] if layer.bias is not None else [])
    got_dx, got_dv, *got_db = torch.autograd.grad(y, mine, dy)
    close(y, expected, dtype)
    close(got_dx, dx, dtype)
    close(got_dv, at_units(dw, topology), dtype)
    for got, want in zip(got_db, db, strict=True):
        close(got, want, dtype)


@pytest.mark.parametrize("unit", [(1, 1), (4, 4), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(unit: tuple[int, int], bias: bool) -> None:
    topology = Topology.random((unit[0] * 3, unit[1] * 4), 5, generator(7, "gradcheck"), unit)
    layer = random_layer(topology, bias, 1)
    x = torch.randn(2, 3, topology.shape[1], dtype=torch.float64, generator=generator(2, "x"), requires_grad=True)

    def function(x: Tensor, values: Tensor, vector: Tensor | None = None) -> Tensor:
        parameters = {"values": values} | ({"bias": vector} if vector is not None else {})
        return torch.func.functional_call(layer, parameters, (x,))

    inputs = (x, layer.values) + ((layer.bias,) if layer.bias is not None else ())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@given(topologies(), st.integers(1, 6), st.integers(0, 2**32))
def test_sddmm_at_units_that_are_not_active(
    backend: str, dtype: torch.dtype, topology: Topology, tokens: int, seed: int
) -> None:
    assume(serves(backend, topology, dtype))
    inactive = topology.sample_inactive((topology.units - topology.count + 1) // 2, generator(seed, "sample"))
    shuffled = inactive[torch.randperm(inactive.numel(), generator=generator(seed, "order"))]
    x = torch.randn(tokens, topology.shape[1], dtype=dtype, generator=generator(seed, "x"))
    dy = torch.randn(tokens, topology.shape[0], dtype=dtype, generator=generator(seed, "dy"))
    for indices in (inactive, shuffled, torch.cat([inactive, inactive])):
        got = BACKENDS[backend].sddmm(dy, x, Layout(topology.shape, topology.unit, indices))
        other = Topology(topology.shape, indices, topology.unit)
        close(got, at_units(dy.double().T @ x.double(), other), dtype)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_operator_is_registered_as_torch_wants_it(backend: str, dtype: torch.dtype) -> None:
    topology = Topology.random((6, 5), 9, generator(0, "opcheck"))
    layer = random_layer(topology, True, 0, dtype, backend)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    arguments = (x, layer.values, layer.bias, layer.indices, layer.prepare().structures, 6, 5, backend, True)
    torch.library.opcheck(torch.ops.sparsae.linear.default, arguments)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_frozen_parts_get_no_gradient(backend: str, dtype: torch.dtype) -> None:
    layer = random_layer(Topology.random((6, 5), 9, generator(0, "frozen")), True, 0, dtype, backend)
    layer.values.requires_grad_(False)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is None
    close(x.grad, layer.dense_weight().double().sum(0).expand(4, 5), dtype)
    assert torch.equal(layer.bias.grad, torch.full((6,), 4.0, dtype=dtype))
    layer.values.requires_grad_(True)
    layer(x.detach()).sum().backward()
    close(layer.values.grad, at_units(x.detach().double().sum(0).expand(6, 5), layer.topology), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_autocast_computes_in_bfloat16(backend: str, unit: tuple[int, int]) -> None:
    if BACKENDS[backend].refusal(unit, CPU, torch.float32) is not None:
        pytest.skip("this backend does not run here")
    topology = Topology.random((32, 24), 20, generator(0, "autocast"), unit)
    layer = random_layer(topology, True, 0, torch.float32, backend)
    x = torch.randn(8, 24, generator=generator(0, "x"), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == layer.values.grad.dtype == torch.float32
    expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("backend", "dtype"), [case for case in CASES if case.values[1] == torch.float32])
def test_compiles_without_a_graph_break_and_follows_a_new_topology(backend: str, dtype: torch.dtype) -> None:
    layer = random_layer(Topology.random((12, 10), 30, generator(0, "compile")), True, 0, dtype, backend)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 10, generator=generator(0, "x"))
    for round_ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=round_ == 2):
            got, want = compiled(x), layer(x)
        torch.testing.assert_close(got, want)
        got.float().sum().backward()
        assert layer.values.grad is not None
        topology = Topology.random((12, 10), 30 + round_, generator(round_, "next"))
        layer.set_topology(topology, torch.randn(topology.count))


def test_the_number_of_values_may_change_while_an_old_loss_is_alive() -> None:
    layer = random_layer(Topology.random((12, 10), 30, generator(0, "alive")), True, 0, torch.float32)
    x = torch.randn(4, 10, generator=generator(0, "x"))
    losses = []
    for count in (30, 37, 5):
        layer.set_topology(Topology.random((12, 10), count, generator(count, "alive")), torch.randn(count))
        losses.append(layer(x).square().sum())
        losses[-1].backward()
        assert layer.values.grad is not None
        assert layer.values.grad.shape == (count,)


def test_unknown_backend_and_refusal_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((4, 4), (1, 1), torch.arange(3, dtype=torch.int32))
    with pytest.raises(InputError, match=r"unknown backend .fast.*reference"):
        choose_backend("fast", layout, torch.float32)
    reference = BACKENDS["reference"]
    monkeypatch.setattr(type(reference), "refusal", lambda self, unit, device, dtype: "it is Sunday")
    with pytest.raises(InputError, match="cannot serve a 4x4 layer: it is Sunday"):
        choose_backend("reference", layout, torch.float32)


def test_a_compiled_model_is_compiled_again_once_when_numbers_of_connections_change_and_never_when_they_move() -> None:
    layer = random_layer(Topology.random((24, 20), 48, generator(0, "first")), True, 0, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    # As training with training.compile sets it.
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        compiled = torch.compile(layer, backend=counter, dynamic=None)
        counts = []
        for step, count in enumerate((48, 48, 48, 50, 47, 30)):
            layer.set_topology(Topology.random((24, 20), count, generator(step, "next")), torch.randn(count))
            compiled(torch.ones(4, 20)).sum().backward()
            counts.append(counter.frame_count)
    assert counts == [1, 1, 1, 2, 2, 2]
