"""The experts of transformers' models, which hold the weights of all of them as one parameter with three dimensions.

A class that transformers can compute in several ways says how its weights lie, and gates by a method: that is all that
there is to know of it. (experts, out, in) have Mixtral and Qwen3-MoE; (experts, in, out), with biases and a gate of its
own over interleaved columns, gpt_oss. No module is called for an expert there, so what takes the place of all is called
in their stead, with the tokens and where a router sends them.

Every matrix of every expert becomes a layer of its own, `experts.3.gate_up_proj`: it has its own density, bounds and
swaps, like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from sparsae.nn.kinds.kind import KINDS, Kind
from sparsae.nn.weight import DenseView

if TYPE_CHECKING:
    from sparsae.nn.linear import SparseLinear

_DOWN = "down_proj"


@KINDS.register
@dataclass(frozen=True)
class Experts(Kind):
    """Experts of a class `dense`, whose parameters have these names, in their order."""

    dense: Any  # a class of modules
    count: int
    is_gated: bool
    is_transposed: bool
    names: tuple[str, ...]

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        is_told = {"has_bias", "is_transposed"} <= vars(module).keys() and hasattr(type(module), "_apply_gate")
        weights = [module._parameters.get(name) for name in _weights(module)] if is_told else []
        return is_told and all(weight is not None and weight.dim() == 3 for weight in weights)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if vars(module).get("_is_expert_parallel", False):
            return "experts that are spread over processes"
        # The decorator that tells how the weights lie stands before the forward that they were written with.
        if not hasattr(type(module).forward, "__wrapped__"):
            return f"experts with a forward of their own ({type(module).__name__})"
        return None

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        weight = module._parameters[_DOWN]
        assert weight is not None
        own = vars(module)
        return cls(
            type(module), weight.shape[0], own.get("has_gate", True), own["is_transposed"], tuple(module._parameters)
        )

    @property
    def weights(self) -> tuple[str, ...]:
        return ("gate_up_proj" if self.is_gated else "up_proj", _DOWN)

    @property
    def biases(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.weights)

    def parts(self, weight: str) -> tuple[str, ...]:
        return tuple(f"{expert}.{weight}" for expert in range(self.count))

    def split(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        matrices = tensor.mT if self.is_transposed else tensor
        return dict(zip(self.parts(weight), matrices, strict=True))

    def join(self, weight: str, matrices: Mapping[str, Tensor]) -> Tensor:
        stacked = torch.stack([matrices[part] for part in self.parts(weight)])
        return stacked.mT if self.is_transposed else stacked

    def layers(self, twin: nn.Module) -> dict[str, nn.Module]:
        return {part: twin.get_submodule(part) for weight in self.weights for part in self.parts(weight)}

    def hold(self, module: nn.Module, layers: Mapping[str, SparseLinear]) -> nn.Module:
        return SparseExperts(self, layers, {name: module._parameters[name] for name in self.biases})

    def release(self, twin: nn.Module) -> nn.Module:
        dense = self.dense.__new__(self.dense)
        nn.Module.__init__(dense)
        for name in self.names:
            dense.register_parameter(name, twin._parameters.get(name))
        return dense

    def own_names(self, twin: nn.Module) -> frozenset[str]:
        return frozenset({"kind", *map(str, range(self.count)), *self.names})


class SparseExperts(nn.Module):
    """Stands for all experts of a block, each of which is a module with two sparse layers, by its number."""

    def __init__(self, kind: Experts, layers: Mapping[str, SparseLinear], biases: Mapping[str, Any]) -> None:
        """layers: those of `kind`; biases: (experts, out), by the names that the dense module has for them."""
        super().__init__()
        self.kind = kind
        for name, bias in biases.items():
            self.register_parameter(name, bias)
        for expert in range(kind.count):
            layers_of_one = {weight: layers[f"{expert}.{weight}"] for weight in kind.weights}
            self.add_module(str(expert), nn.ModuleDict(layers_of_one))

    def forward(self, x_TI: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """x: (tokens, in) to (tokens, in): the sum of what its experts, by number, make of a token, weighted.

        A number that no expert has counts for nothing.
        """
        y_TI = torch.zeros_like(x_TI)
        # An expert without tokens has a gradient of zero, as it has where the experts are one parameter.
        trains = self.training or torch.is_grad_enabled()
        for expert in range(self.kind.count):
            tokens, places = torch.where(experts_TK == expert)
            if trains or tokens.numel():
                made = self._expert(expert, x_TI[tokens]) * weights_TK[tokens, places, None]
                y_TI.index_add_(0, tokens, made.to(y_TI.dtype))
        return y_TI

    def _expert(self, expert: int, x_TI: Tensor) -> Tensor:
        """x: (tokens of this expert, in) to (tokens, in)."""
        into, out = self.kind.weights
        # What the dense module has besides its weights, this one has too: see nn/carry.py.
        own: Any = self
        activate = partial(self.kind.dense._apply_gate, own) if self.kind.is_gated else own.act_fn
        y: Tensor = self._project(expert, out, activate(self._project(expert, into, x_TI)))
        return own.post_expert_norm(y) if vars(self).get("has_post_expert_norm", False) else y

    def _project(self, expert: int, weight: str, x: Tensor) -> Tensor:
        layers: Any = self._modules[str(expert)]
        y: Tensor = layers[weight](x)
        bias = self._parameters.get(f"{weight}_bias")
        return y if bias is None else y + bias[expert]

    @property
    def gate_up_proj(self) -> Tensor:
        """The dense parameter of gated experts, to read: see nn/weight.py."""
        return self._dense("gate_up_proj")

    @property
    def up_proj(self) -> Tensor:
        """The dense parameter of experts without a gate, to read."""
        return self._dense("up_proj")

    @property
    def down_proj(self) -> Tensor:
        """The dense parameter, to read."""
        return self._dense(_DOWN)

    def _dense(self, weight: str) -> Tensor:
        kind = self.kind
        if weight not in kind.weights:
            raise AttributeError(weight)
        layers: dict[str, Any] = {part: self.get_submodule(part) for part in kind.parts(weight)}

        def build() -> Tensor:
            return kind.join(weight, {part: layer.matrix() for part, layer in layers.items()}).contiguous()

        first = layers[f"0.{weight}"]
        rows, columns = first.topology.shape
        sides = (columns, rows) if kind.is_transposed else (rows, columns)
        trains = any(layer.values.requires_grad for layer in layers.values())
        return DenseView(build, (kind.count, *sides), first.values, requires_grad=trains)


def _weights(module: nn.Module) -> tuple[str, ...]:
    return ("gate_up_proj" if vars(module).get("has_gate", True) else "up_proj", _DOWN)
