"""A whole sparse MLP as one differentiable operator: up, activation (gated or not) and down, by a backend that has it.

    Y = f(X Wu^T + bu) Wd^T + bd        or        Y = (f(X Wg^T + bg) * (X Wu^T + bu)) Wd^T + bd

Of the hidden layer what goes into the activation is kept for backward, in float32 or bfloat16, or nothing is: backward
then computes it again, tile by tile. Only where a probe wants gradients at other units of these weights
(kernels/probe.py) is backward composed of the single layers' operators, which compute it again in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsae.kernels.backend import Backend, MlpGradients, Weight
from sparsae.kernels.function import sparse_linear_backward
from sparsae.kernels.probe import note_forward, open_probe
from sparsae.kernels.registry import BACKENDS
from sparsae.kernels.structures import key_and_layout, multiplied

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}
# What can be kept of the hidden layer, by its name in the settings.
KEEPS = {"nothing": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
# (gradient of f(z), z) to the gradient of z: autograd does not look into an operator.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu_tanh": lambda df, z: torch.ops.aten.gelu_backward(df, z, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda df, z: torch.ops.aten.threshold_backward(df, z, 0),
    "silu": torch.ops.aten.silu_backward,
}


@torch.library.custom_op("sparsae::fused_mlp", mutates_args=())
def sparse_mlp(
    x: Tensor,
    values: list[Tensor],
    biases: list[Tensor],
    indices: list[Tensor],
    structures: list[Tensor],
    hidden_features: int,
    out_features: int,
    activation: str,
    backend: str,
    trains: bool,
    keeps: str,
) -> tuple[Tensor, Tensor]:
    """x: (..., in) float32 or bfloat16 to (..., out), and what backward wants of the hidden layer.

    Lists go by weight: up, down and, where gated, gate. values: in x's dtype. biases: (0,) for none. indices: as the
    layers have them. structures: for each weight those of kernels/structures.py. trains: see `Probe.called`. keeps: of
    KEEPS, and nothing, (0,), where the backend does not keep that. Raises InputError where they are of other indices.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    keys, weights = _weights(values, biases, structures, x.shape[-1], hidden_features, out_features)
    for key in keys:
        note_forward(key, trains)
    for number, (weight, own) in enumerate(zip(weights, indices, strict=True)):
        read, layout = multiplied(BACKENDS[backend], weight.values, own, weight.layout)
        weights[number] = weight._replace(values=read, layout=layout)
    kept = _room(x, len(values), hidden_features, backend, keeps)
    y_TO = BACKENDS[backend].mlp_forward(weights, x_TI, activation, *_given(kept))
    return y_TO.view(*x.shape[:-1], out_features), kept


@sparse_mlp.register_fake
def _(
    x: Tensor,
    values: list[Tensor],
    biases: list[Tensor],
    indices: list[Tensor],
    structures: list[Tensor],
    hidden_features: int,
    out_features: int,
    activation: str,
    backend: str,
    trains: bool,
    keeps: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], out_features), _room(x, len(values), hidden_features, backend, keeps)


@torch.library.custom_op("sparsae::fused_mlp_backward", mutates_args=())
def sparse_mlp_backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    values: list[Tensor],
    biases: list[Tensor],
    structures: list[Tensor],
    hidden_features: int,
    out_features: int,
    activation: str,
    backend: str,
) -> list[Tensor]:
    """dX, then the gradients of the values, then of the biases ((0,) for none)."""
    dy_TO, x_TI = dy.reshape(-1, out_features), x.reshape(-1, x.shape[-1])
    keys, weights = _weights(values, biases, structures, x.shape[-1], hidden_features, out_features)
    if any(open_probe(key) is not None for key in keys):
        gradients = composed_backward(BACKENDS[backend], weights, keys, dy_TO, x_TI, activation)
    else:
        gradients = BACKENDS[backend].mlp_backward(weights, dy_TO, x_TI, activation, *_given(kept))
    if biases[1].numel():
        gradients.biases[1] = dy_TO.sum(0)
    return [
        gradients.x.view(x.shape),
        *(gradient.to(v.dtype) for gradient, v in zip(gradients.values, values, strict=True)),
        *(b.new_empty(0) if g is None else g.to(b.dtype) for g, b in zip(gradients.biases, biases, strict=True)),
    ]


@sparse_mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    values: list[Tensor],
    biases: list[Tensor],
    structures: list[Tensor],
    hidden_features: int,
    out_features: int,
    activation: str,
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *values, *biases)]


def composed_backward(
    backend: Backend, weights: Sequence[Weight], keys: Sequence[Tensor], dy_TO: Tensor, x_TI: Tensor, activation: str
) -> MlpGradients:
    """As `Backend.mlp_backward`, from the single layers' operators, which answer the probes of the layers' keys."""
    (up, down, *gate), (up_key, down_key, *gate_key) = weights, keys

    def product(weight: Weight) -> Tensor:
        return backend.spmm(weight.values, weight.layout, x_TI, weight.bias)

    def backward_of(weight: Weight, key: Tensor, dy_TO: Tensor, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        structures = [key, weight.layout.indices, *weight.layout.derived]
        dx_TI, dvalues, _ = sparse_linear_backward(
            dy_TO, x_TI, weight.values, structures, *weight.layout.shape, backend.name, True, True, False
        )
        return dx_TI, dvalues

    z_up = product(up)
    if not gate:
        dhidden, ddown = backward_of(down, down_key, dy_TO, ACTIVATIONS[activation](z_up))
        dz = [_DERIVATIVES[activation](dhidden, z_up)]
    else:
        z_gate = product(gate[0])
        factor = ACTIVATIONS[activation](z_gate)
        dhidden, ddown = backward_of(down, down_key, dy_TO, factor * z_up)
        dz = [dhidden * factor, _DERIVATIVES[activation](dhidden * z_up, z_gate)]
    parts = [backward_of(w, key, d, x_TI) for w, key, d in zip((up, *gate), (up_key, *gate_key), dz, strict=True)]
    dx = parts[0][0] if not gate else parts[0][0] + parts[1][0]
    sums = [None if w.bias is None else d.sum(0) for w, d in zip((up, *gate), dz, strict=True)]
    return MlpGradients(dx, [parts[0][1], ddown, *(p[1] for p in parts[1:])], [sums[0], None, *sums[1:]])


def _weights(
    values: list[Tensor], biases: list[Tensor], structures: list[Tensor], in_features: int, hidden: int, out: int
) -> tuple[list[Tensor], list[Weight]]:
    shapes = [(hidden, in_features), (out, hidden), (hidden, in_features)]
    each = len(structures) // len(values)
    keys, weights = [], []
    for number, (value, bias) in enumerate(zip(values, biases, strict=True)):
        key, layout = key_and_layout(value, structures[each * number : each * (number + 1)], *shapes[number])
        keys.append(key)
        weights.append(Weight(value.data, bias if bias.numel() else None, layout))
    return keys, weights


def _room(x: Tensor, weights: int, hidden_features: int, backend: str, keeps: str) -> Tensor:
    """Where a forward pass over x keeps the hidden layer; (0,) where nothing is kept."""
    dtype = KEEPS[keeps]
    if dtype is None or dtype not in BACKENDS[backend].mlp_keeps:
        return x.new_empty(0)
    return x.new_empty(x.numel() // x.shape[-1], (weights - 1) * hidden_features, dtype=dtype)


def _given(kept: Tensor) -> tuple[Tensor, ...]:
    """As an argument that backends which keep nothing need not have."""
    return (kept,) if kept.dim() > 1 else ()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, biases, _, structures, *ctx.settings, _, _ = inputs
    kept = output[1]
    ctx.count = len(values)
    ctx.mark_non_differentiable(kept)
    # Else a gradient of zeros would be made for what is kept.
    ctx.set_materialize_grads(False)
    # Detached for the reason that function.py gives.
    ctx.save_for_backward(x, kept, *(value.detach() for value in values), *biases, *structures)


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, kept, *rest = ctx.saved_tensors
    values, biases, structures = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
    dx, *gradients = torch.ops.sparsae.fused_mlp_backward(dy, x, kept, values, biases, structures, *ctx.settings)
    dbiases = [g if b.numel() else None for g, b in zip(gradients[ctx.count :], biases, strict=True)]
    none = [None] * ctx.count
    return dx, gradients[: ctx.count], dbiases, none, [None] * len(structures), None, None, None, None, None, None


sparse_mlp.register_autograd(_backward, setup_context=_setup_context)
