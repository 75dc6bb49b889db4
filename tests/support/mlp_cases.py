"""Products of a fused MLP, with their twin that autograd differentiates, and the MLPs of models."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout, MlpGradients, Weight
from sparsae.kernels.cpu import native
from sparsae.kernels.mlp import ACTIVATIONS
from sparsae.kernels.reference import Reference


class Case:
    """An MLP with its activations; `exact` computes it densely in float64."""

    def __init__(
        self,
        draw: tuple[tuple[int, int], int, int, int],
        gated: bool,
        activation: str,
        biased: bool,
        tokens: int,
        seed: int,
    ) -> None:
        unit, *sizes = draw
        rng = generator(seed, "mlp")
        # The hidden layer is the rows of one weight and the columns of the other: whole units of both.
        in_, hidden, out = sizes[0] * unit[1], sizes[1] * math.lcm(*unit), sizes[2] * unit[0]
        self.activation, self.tokens = activation, tokens
        self.weights = []
        for shape in [(hidden, in_), (out, hidden), (hidden, in_)][: 3 if gated else 2]:
            units = shape[0] * shape[1] // (unit[0] * unit[1])
            count = int(torch.randint(units + 1, (), generator=rng))
            topology = Topology.random(shape, count, rng, unit)
            layout = Layout(shape, unit, topology.indices)
            values = torch.randn(topology.values_shape, generator=rng) / shape[1] ** 0.5
            bias = torch.randn(shape[0], generator=rng) if biased else None
            self.weights.append(Weight(values, bias, layout._replace(derived=list(native.make_index(layout)))))
        self.x = torch.randn(tokens, in_, generator=rng)
        self.dy = torch.randn(tokens, out, generator=rng)

    def run(self, keeps: torch.dtype | None = None) -> list[Tensor]:
        features = (len(self.weights) - 1) * self.weights[0].layout.shape[0]
        kept = None if keeps is None else torch.empty(self.tokens, features, dtype=keeps)
        y = native.mlp_forward(self.weights, self.x, self.activation, kept)
        return [y, *self.flat(native.mlp_backward(self.weights, self.dy, self.x, self.activation, kept))]

    @staticmethod
    def flat(gradients: MlpGradients) -> list[Tensor]:
        return [gradients.x, *gradients.values, *(b for b in gradients.biases if b is not None)]

    def exact(self) -> list[Tensor]:
        x = self.x.double().requires_grad_()
        values = [w.values.double().requires_grad_() for w in self.weights]
        biases = [None if w.bias is None else w.bias.double().requires_grad_() for w in self.weights]

        def product(number: int, inputs: Tensor) -> Tensor:
            layout, bias = self.weights[number].layout, biases[number]
            weight_IO = Differentiable.apply(values[number], layout)
            return inputs @ weight_IO if bias is None else inputs @ weight_IO + bias

        hidden = ACTIVATIONS[self.activation](product(-1 if len(values) > 2 else 0, x))
        if len(values) > 2:
            hidden = hidden * product(0, x)
        y = product(1, hidden)
        wanted = [x, *values, *(b for n, b in enumerate(biases) if b is not None and n != 1)]
        return [y.detach(), *torch.autograd.grad(y, wanted, self.dy.double())]


UNITS = [(1, 1), (4, 4), (16, 16), (2, 3), (5, 1), (1, 7)]


cases = st.builds(
    Case,
    st.tuples(st.sampled_from(UNITS), st.integers(1, 6), st.integers(1, 12), st.integers(1, 6)),
    st.booleans(),
    st.sampled_from(list(ACTIVATIONS)),
    st.booleans(),
    st.integers(0, 150),
    st.integers(0, 2**32),
)


class Differentiable(torch.autograd.Function):
    """Values to a dense (in, out) weight."""

    @staticmethod
    def forward(ctx: object, values: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout  # type: ignore[attr-defined]
        return Reference()._scatter(values, layout).clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout  # type: ignore[attr-defined]
        identity = torch.eye(layout.shape[1], dtype=gradient.dtype)
        return Reference().sddmm(gradient.contiguous(), identity, layout), None


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * (1 + largest))


def gpt2(width: int = 32, activation: str = "gelu_new", dropout: float = 0.0) -> nn.Module:
    config = GPT2Config(n_embd=width, activation_function=activation, resid_pdrop=dropout)
    return nn.Sequential(GPT2MLP(4 * width, config))


def llama(width: int = 32) -> nn.Module:
    return nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=48, num_attention_heads=2)))


def everything(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
