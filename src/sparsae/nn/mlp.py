"""The MLPs of the families over sparse layers: one fused operator where their backend has it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sparsae.errors import InputError
from sparsae.families import FAMILIES, Family
from sparsae.kernels.mlp import KEEPS, sparse_mlp
from sparsae.kernels.registry import BACKENDS
from sparsae.nn.linear import SparseLinear
from sparsae.nn.tracing import by_operators, in_autocast

_ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


class FusedMLP(nn.Module):
    """Stands for the MLP of a family whose layers are sparse; they keep their names, and so does everything saved.

    Where the fused operator cannot serve (another backend, layers of different units) or would not pay (a token or two,
    many weights) the module that it stands for computes, with the same layers.
    """

    def __init__(self, original: nn.Module) -> None:
        """Takes over the layers of `original`, an MLP that `recognized` says yes to."""
        super().__init__()
        family = _family_of(original)
        assert family is not None
        self._names, self._activation = family.mlp_layers, family.activation
        # What a forward pass that is differentiated keeps of the hidden layer: see `mlp_keeps`.
        self.keeps = "nothing"
        for name, child in original.named_children():
            self.add_module(name, child)
        # In a tuple, so that its parameters are not counted twice.
        self._original = (original,)

    @property
    def original(self) -> nn.Module:
        """The module that this one stands for, with the layers as they are now."""
        (original,) = self._original
        for name, child in self.named_children():
            setattr(original, name, child)
        return original

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        layers: list[Any] = [self._modules[name] for name in self._names]
        activation = kernel_of(self._modules[self._activation])
        if activation is None or not self._fuses(layers, x, activation):
            return self.original(x)
        if torch.compiler.is_compiling():
            return self._fused(layers, x, activation)
        with contextlib.ExitStack() as locks:
            for layer in layers:
                locks.enter_context(layer.lock)
            return self._fused(layers, x, activation)

    def _fused(self, layers: list[SparseLinear], x: Tensor, activation: str) -> Tensor:
        structures = [tensor for layer in layers for tensor in layer.prepare().structures]
        indices = [layer.indices for layer in layers]
        x, values = in_autocast(x), [in_autocast(layer.values) for layer in layers]
        biases = [values[0].new_empty(0) if layer.bias is None else in_autocast(layer.bias) for layer in layers]
        up, down = layers[:2]
        trains = self.training or torch.is_grad_enabled()
        sizes = up.out_features, down.out_features
        y, _ = sparse_mlp(
            x, values, biases, indices, structures, *sizes, activation, up.kernel, trains, self._kept() or "nothing"
        )
        dropout = self._modules.get("dropout")
        return y if dropout is None else dropout(y)

    def _fuses(self, layers: list[Any], x: Tensor, activation: str) -> bool:
        if any(type(layer) is not SparseLinear for layer in layers):
            return False
        # A hook wants to see what goes through; for a token or two the single layers are faster; and of an x that does
        # not fit they say so.
        if by_operators() or x.shape[-1:] != (layers[0].in_features,) or x.numel() <= 2 * x.shape[-1]:
            return False
        if any(map(hooked, (*layers, self._modules[self._activation], *self._original))):
            return False
        # The operator computes all gradients.
        if torch.is_grad_enabled() and not all(layer.values.requires_grad for layer in layers):
            return False
        if any(layer.kernel != layers[0].kernel for layer in layers):
            return False
        backend, layouts = BACKENDS[layers[0].kernel], [layer.layout for layer in layers]
        refusal = backend.mlp_refusal(layouts, activation, in_autocast(x[:0]).dtype)
        return refusal is None and backend.mlp_pays(layouts, self._kept(), x.numel() // x.shape[-1])

    def _kept(self) -> str | None:
        """Of the hidden layer for backward; None where none follows."""
        return self.keeps if torch.is_grad_enabled() else None


def mlp_keeps(model: nn.Module, what: str) -> nn.Module:
    """Sets what the fused MLPs of `model` keep of their hidden layer from forward to backward; returns the model.

    what: "nothing", where they begin: backward computes the hidden layer again, a product more (two where gated);
    "float32" or "bfloat16": what goes into the activation, in 4 or 2 bytes for each token and hidden feature (twice
    that where gated). Gradients are the same with "nothing" and "float32"; with "bfloat16" they are those of a hidden
    layer rounded to 8 bits, while outputs are not rounded. Raises InputError for anything else. Without effect on MLPs
    that are not fused, as on a GPU.
    """
    if what not in KEEPS:
        raise InputError(f"mlp_keeps: must be one of {', '.join(KEEPS)}, not {what!r}")
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.keeps = what
    return model


def hooked(module: nn.Module) -> bool:
    """Whether anybody listens to what goes through this module, or through every module, or replaced its forward."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or "forward" in vars(module) or bool(_has_any_global_hook())


def kernel_of(activation: nn.Module | None) -> str | None:
    """The kernels' name of an activation; None for one that they do not know."""
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(activation).__name__)


def recognized(module: nn.Module) -> bool:
    """Whether this is an MLP of transformers with sparse layers and an activation that the kernels know."""
    family = _family_of(module)
    return (
        family is not None
        and kernel_of(getattr(module, family.activation)) is not None
        and all(isinstance(getattr(module, layer), SparseLinear) for layer in family.mlp_layers)
    )


def _family_of(mlp: nn.Module) -> Family | None:
    """The family whose MLP this is; None: of none."""
    if not type(mlp).__module__.startswith("transformers."):
        return None
    return next((family for family in FAMILIES.loaded() if family.mlp_class == type(mlp).__name__), None)
