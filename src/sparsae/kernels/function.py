"""The sparse product as one differentiable operator over all backends.

It is a registered custom operator with a fake kernel, so that `torch.compile` sees one opaque node and no graph break.
Torch keeps compiled graphs, backward included, on disk by the operators of forward alone: an operator whose backward
calls something else from now on needs a new name, or graphs of an older version are run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsae.kernels.backend import Needs
from sparsae.kernels.probe import note_forward, open_probe
from sparsae.kernels.registry import BACKENDS
from sparsae.kernels.structures import key_and_layout, multiplied


@torch.library.custom_op("sparsae::linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    structures: list[Tensor],
    out_features: int,
    in_features: int,
    backend: str,
    trains: bool,
) -> Tensor:
    """Y = X W^T + b. x: (..., in); values: (nnz,) or (count, b_out, b_in), with x's dtype or, where the backend
    casts, their own; returns (..., out).

    indices: as the layer has them; structures: what kernels/structures.py made from them. trains: see `Probe.called`.
    Raises InputError where the structures are of other indices.
    """
    key, layout = key_and_layout(values, structures, out_features, in_features)
    note_forward(key, trains)
    values, layout = multiplied(BACKENDS[backend], values, indices, layout)
    y_TO = BACKENDS[backend].spmm(values, layout, x.reshape(-1, in_features), bias)
    # A guest's may lie otherwise. No view of it, which FSDP warns of: nobody else has what it would be a view of.
    y: Tensor = torch.ops.aten._unsafe_view(y_TO.contiguous(), [*x.shape[:-1], out_features])
    return y


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    structures: list[Tensor],
    out_features: int,
    in_features: int,
    backend: str,
    trains: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("sparsae::linear_backward", mutates_args=())
def sparse_linear_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    structures: list[Tensor],
    out_features: int,
    in_features: int,
    backend: str,
    needs_x: bool,
    needs_values: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, gradients of the values and of the bias); one that is not needed comes back empty."""
    key, layout = key_and_layout(values, structures, out_features, in_features)
    dy_TO, x_TI = dy.reshape(-1, out_features), x.reshape(-1, in_features)
    needs = Needs(needs_x, needs_values, needs_bias)
    dx, dvalues, dbias = BACKENDS[backend].backward(values, layout, dy_TO, x_TI, needs)
    if needs_values and (probe := open_probe(key)) is not None:
        probe.add(BACKENDS[backend], layout, dy_TO, x_TI)
    return (
        dy.new_empty(0) if dx is None else dx.contiguous().view(*dy.shape[:-1], in_features),
        dy.new_empty(0) if dvalues is None else dvalues,
        dy.new_empty(0) if dbias is None else dbias,
    )


@sparse_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    structures: list[Tensor],
    out_features: int,
    in_features: int,
    backend: str,
    needs_x: bool,
    needs_values: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(*dy.shape[:-1], in_features) if needs_x else dy.new_empty(0),
        values.new_empty(values.shape) if needs_values else dy.new_empty(0),
        dy.new_empty(out_features if needs_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, _, structures, ctx.out_features, ctx.in_features, ctx.backend, _ = inputs
    # The input is only needed for the gradient of the values. A parameter itself would come back as it is then, with
    # the values of a topology that it was given in between.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), values.detach(), *structures)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    x, values, *structures = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx, dvalues, dbias = torch.ops.sparsae.linear_backward(
        dy,
        x,
        values,
        structures,
        ctx.out_features,
        ctx.in_features,
        ctx.backend,
        needs_x,
        needs_values,
        needs_bias,
    )
    return (
        dx if needs_x else None,
        dvalues if needs_values else None,
        dbias if needs_bias else None,
        None,
        [None] * len(structures),
        None,
        None,
        None,
        None,
    )


sparse_linear.register_autograd(_backward, setup_context=_setup_context)
