"""Magnitude pruning in place: the smallest weights of a layer, or of all of them, and no others."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsae import sparsify
from sparsae.nn.choice import linear_layers
from sparsae.nn.linear import sparse_layers
from sparsae.nn.pruning import Prunable, global_zeros, prunable, uniform_zeros


@given(st.integers(0, 1000), st.floats(0.0, 0.999), st.booleans())
def test_the_smallest_of_all_layers_are_found_without_putting_them_together(
    seed: int, sparsity: float, coarse: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=rng) * scale for n, scale in ((7, 3), (9, 5), (30, 7), (1, 1))]
    if coarse:  # many equal ones, and zeros of either sign
        tensors = [(tensor.round() * torch.tensor(-1.0)).clone() for tensor in tensors]
    layers = [Prunable(tensor, missing) for tensor, missing in zip(tensors, (0, 5, 0, 2), strict=True)]
    missing = sum(layer.missing for layer in layers)
    wanted = max(0, round(sparsity * sum(layer.positions for layer in layers)) - missing)
    expected = torch.cat([tensor.abs() for tensor in tensors]).sort(stable=True).values[:wanted]
    zeros = global_zeros(layers, sparsity)
    assert sum(zeros) - missing == wanted
    taken = torch.cat(
        [layer.weights.abs().sort().values[: n - layer.missing] for layer, n in zip(layers, zeros, strict=True)]
    )
    assert torch.equal(taken.sort().values, expected)


@pytest.mark.parametrize("zeros", [uniform_zeros, global_zeros])
def test_a_sparse_layer_is_pruned_as_its_dense_twin(zeros: object) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter *= torch.rand_like(parameter) < 0.5
    sparse = sparsify(copy.deepcopy(dense), start="nonzero")
    x = torch.randn(4, 16)
    for sparsity in (0.3, 0.7, 0.9):
        for layers in (linear_layers(dense), sparse_layers(sparse)):
            chosen = prunable(layers)
            for layer, count in zip(chosen, zeros(chosen, sparsity), strict=True):  # type: ignore[operator]
                layer.prune(count)
                assert layer.zeros() >= count
        for one, other in zip(linear_layers(dense).values(), sparse_layers(sparse).values(), strict=True):
            assert torch.equal(one.weight, other.dense_weight())
        with torch.no_grad():
            assert torch.allclose(dense(x), sparse(x), atol=1e-6)
