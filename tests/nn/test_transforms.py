"""Function transforms and forward-mode differentiation: a sparse layer is to them what its dense twin is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear
from sparsae.nn.sparsify import densify, sparsify
from tests.kernels.test_indices import HERE

# torch's own, at the first use of forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

X, TANGENT = torch.randn(5, 24, generator=generator(1)), torch.randn(5, 24, generator=generator(2))


def layer_of(backend: str, unit: tuple[int, int] = (1, 1), seed: int = 0) -> SparseLinear:
    torch.manual_seed(seed)
    layer = sparsify(nn.Sequential(nn.Linear(24, 16)), 0.8, backend=backend, unit=unit, seed=seed)[0]  # type: ignore[index]
    assert isinstance(layer, SparseLinear)
    return layer


def _dual(layer: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(X, TANGENT))).tangent
    assert tangent is not None
    return tangent


def _dual_bias(layer: nn.Module) -> Tensor:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    return jvp(lambda b: functional_call(layer, {"bias": b}, (X,)), (bias.detach(),), (torch.ones(16),))[1]


TRANSFORMS: dict[str, Callable[[nn.Module], Tensor]] = {
    "jvp": lambda layer: jvp(layer, (X,), (TANGENT,))[1],
    "jvp of the bias": _dual_bias,
    "dual numbers": _dual,
    "jacfwd": lambda layer: jacfwd(layer)(X[0]),
    "jacrev": lambda layer: jacrev(layer)(X[0]),
    "vjp": lambda layer: vjp(layer, X)[1](torch.ones(5, 16))[0],
    "vmap": lambda layer: vmap(layer)(X),
    "gradient of each sample": lambda layer: vmap(grad(lambda x: layer(x).square().sum()))(X),
    "of second order": lambda layer: jacfwd(grad(lambda x: layer(x).pow(3).sum()))(X[0]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_they_give_what_they_give_for_a_dense_layer(
    name: str, backend: str, unit: tuple[int, int], mode: Callable[[], torch.no_grad]
) -> None:
    layer = layer_of(backend, unit)
    with mode():
        got = TRANSFORMS[name](layer)
        want = TRANSFORMS[name](densify(nn.Sequential(copy.deepcopy(layer)))[0])  # type: ignore[index]
    torch.testing.assert_close(got, want)
    assert got.any()


@pytest.mark.parametrize("name", ["jvp", "vmap", "vjp"])
def test_they_are_compiled_too(name: str) -> None:
    layer = layer_of("auto")
    torch.compiler.reset()
    compiled = torch.compile(lambda: TRANSFORMS[name](layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), TRANSFORMS[name](layer))


def test_gradients_of_a_layers_state_are_those_of_backward() -> None:
    layer = layer_of("auto")
    state = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    indices = state.pop("indices")

    def loss(parameters: dict[str, Tensor], buffer: Tensor) -> Tensor:
        return functional_call(layer, {**parameters, "indices": buffer}, (X,)).square().sum()

    gradients = grad(loss)(state, indices)
    layer(X).square().sum().backward()
    assert layer.values.grad is not None
    torch.testing.assert_close(gradients["values"], layer.values.grad)


def test_layers_are_mapped_over_by_their_values_only() -> None:
    layer, other = layer_of("auto"), layer_of("auto", seed=1)
    stacked = torch.stack([layer.values.detach(), 2 * layer.values.detach()])
    y = vmap(lambda values: functional_call(layer, {"values": values}, (X,)))(stacked)
    torch.testing.assert_close(y[0], layer(X))
    parameters, buffers = stack_module_state([layer, other])  # type: ignore[list-item]
    call = vmap(lambda p, b: functional_call(layer, (p, b), (X,)))
    with pytest.raises(InputError, match="cannot be mapped over"):
        call(parameters, buffers)


def test_a_transform_does_not_change_a_topology() -> None:
    layer, other = layer_of("auto"), layer_of("auto", seed=1)
    with pytest.raises(InputError, match="inside a function transform"):
        grad(lambda x: functional_call(layer, dict(other.state_dict()), (x,)).sum())(X)
    torch.testing.assert_close(functional_call(layer, dict(other.state_dict()), (X,)), other(X))
