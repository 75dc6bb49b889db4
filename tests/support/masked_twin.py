"""A sparse model beside its dense twin, whose inactive weights are zero: equal outputs, equal gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsae.nn.conversion import dense_matrices, sparse_modules
from sparsae.nn.dense import gathered
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify


def require_equal(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], rtol: float = 1e-9, atol: float = 1e-12
) -> nn.Module:
    """Require of a float64 model that its loss and all gradients are its dense twin's; returns the twin."""
    names, layers = list(sparse_modules(model)), sparse_layers(model)
    twin = densify(copy.deepcopy(model))
    model.zero_grad()
    twin.zero_grad()
    losses = [loss_of(each) for each in (model, twin)]
    torch.testing.assert_close(losses[0], losses[1], rtol=rtol, atol=atol)
    for loss in losses:
        loss.backward()
    targets = {name: twin.get_submodule(name) for name in names}
    gradients = copy.deepcopy(targets)
    for name, module in targets.items():
        for weight, parameter in module.named_parameters(recurse=False):
            gradients[name]._parameters[weight] = nn.Parameter(parameter.grad)
    wanted = dense_matrices(gradients)
    assert wanted.keys() == layers.keys()
    for name, layer in layers.items():
        assert layer.values.grad is not None
        torch.testing.assert_close(layer.values.grad, gathered(wanted[name], layer.topology), rtol=rtol, atol=atol)
    values = {id(layer.values) for layer in layers.values()}
    others = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if id(parameter) not in values:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=rtol, atol=atol)
    return twin
