"""What a backend is.

Everything numerical in a sparse layer is one of three products; X is (tokens, in), dY is (tokens, out):

    spmm(values, layout, X)    -> Y  (tokens, out)     forward
    spmm_t(values, layout, dY) -> dX (tokens, in)      backward to the input
    sddmm(dY, X, layout)       -> the gradient at any set of units: the active ones, or a sampled few

A backend may have more, and says why where it has not: a whole MLP at once (`mlp_refusal`); a product that is prepared
once for many single tokens (`token_refusal`), with which may come all blocks of a decoder at once; causal attention
(`attention_refusal`), of which a model takes the first that is there, and the loss of logits (`losses_refusal`) alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsae.core.topology import Topology


class Layout(NamedTuple):
    """A set of units as the kernels get it: plain tensors and numbers that pass through a custom operator."""

    shape: tuple[int, int]
    unit: tuple[int, int]
    indices: Tensor
    derived: Sequence[Tensor] = ()
    # The buffer of the layer, for a backend that compares it with `indices` itself: see `Backend.compares`.
    seen: Tensor | None = None

    @property
    def grid_rows(self) -> int:
        """Rows of the grid of units."""
        return self.shape[0] // self.unit[0]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """(count,), or (count, b_out, b_in) for blocks."""
        count = self.indices.numel()
        return (count,) if self.unit == (1, 1) else (count, *self.unit)


class Needs(NamedTuple):
    """Which of `Gradients` are asked for."""

    x: bool
    values: bool
    bias: bool


class Gradients(NamedTuple):
    """dX (tokens, in), dW at the units of a layout, and db (out,): None for one that was not asked for."""

    x: Tensor | None
    values: Tensor | None
    bias: Tensor | None


class Weight(NamedTuple):
    """One of an MLP's weights, as in `Backend.spmm`."""

    values: Tensor
    bias: Tensor | None
    layout: Layout


class TokenNorm(NamedTuple):
    """A layer norm, or where not centered one by the root of the mean square; scale and bias: (features,)."""

    scale: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool


class TokenBlock(NamedTuple):
    """A block of a decoder: x + output(attention(norm_1(x))), then that + mlp(norm_2(that)).

    projections: of queries, keys and values, or one that gives all three in this order. head_norms: of each head's
    queries and keys. scale: of queries times keys.
    """

    norm_1: TokenNorm
    projections: Sequence[Weight]
    head_norms: tuple[TokenNorm, TokenNorm] | None
    scale: float
    output: Weight
    norm_2: TokenNorm
    up: Weight
    gate: Weight | None
    down: Weight
    activation: str

    @property
    def weights(self) -> list[Weight]:
        """All of them."""
        return [*self.projections, self.output, self.up, self.down, *([] if self.gate is None else [self.gate])]


class TokenShape(NamedTuple):
    """What all blocks share. cos and sin: (context, head_size) of rotary positions, or None."""

    width: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    cos: Tensor | None
    sin: Tensor | None


class MlpGradients(NamedTuple):
    """dX (tokens, in), then dW and db of each weight, in the order of the weights, float32 or as the weights are.

    The output's bias has None, as a weight without a bias has: its gradient is the sum of dY.
    """

    x: Tensor
    values: list[Tensor]
    biases: list[Tensor | None]


class LossWeights(NamedTuple):
    """Of the two sums of `LossSums` in what is differentiated."""

    cross_entropy: float
    divergence: float


class LossInputs(NamedTuple):
    """Logits (tokens, vocabulary), targets (tokens,) of int64, and a teacher's logits, of all tokens or the first ones.

    ignore_index: a target that counts in neither sum; None: all do. gradient: whether it is wanted.
    """

    logits: Tensor
    targets: Tensor
    teacher: Tensor | None
    ignore_index: int | None
    weights: LossWeights
    gradient: bool


class LossSums(NamedTuple):
    """Two scalars in nats, float32 or wider, and of their weighted sum the gradient, in the logits' shape and dtype."""

    cross_entropy: Tensor
    divergence: Tensor
    gradient: Tensor | None


@dataclass(frozen=True)
class Limits:
    """What a device does at most, measured: each function takes a number of threads and the seconds to measure for.

    flops: float32 operations a second, of multiply-adds in registers. bandwidth: bytes a second, of a = b + 3 c.
    """

    instructions: str
    flops: Callable[[int, float], float]
    bandwidth: Callable[[int, float], float]


class Backend(ABC):
    """Computes the three primitives for the units, devices and dtypes that it does not refuse."""

    name: str
    # Whether values may have another dtype than the inputs, as they have under autocast, since it casts what it reads;
    # the gradient of the values then has their dtype.
    casts: bool = False
    # Whether `spmm` compares `layout.seen` with the indices as it reads them, and multiplies by NaN where they differ:
    # asked on devices where an answer would have to be waited for.
    compares: bool = False
    # In which dtypes `mlp_forward` can keep the hidden layer for `mlp_backward`: with none, `kept` is never given.
    mlp_keeps: Sequence[torch.dtype] = ()

    def missing(self, device: torch.device) -> str | None:
        """What this installation lacks for this backend to serve a device that it is made for; None where nothing."""
        return None

    @abstractmethod
    def refusal(self, unit: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve such layers here; None where it can. dtype: that of the values."""

    def pays(self, layout: Layout, dtype: torch.dtype) -> bool:
        """Whether this backend beats dense arithmetic over the same storage. Asked of backends that do not refuse."""
        return True

    def derive(self, topology: Topology) -> list[Tensor]:
        """Index structures that the kernels want beside the topology's own, made once a topology in O(nnz)."""
        return []

    @abstractmethod
    def spmm(self, values: Tensor, layout: Layout, x_TI: Tensor, bias: Tensor | None = None) -> Tensor:
        """Y = X W^T + b, a new (tokens, out) tensor."""

    @abstractmethod
    def spmm_t(self, values: Tensor, layout: Layout, dy_TO: Tensor) -> Tensor:
        """dX = dY W, a new (tokens, in) tensor."""

    @abstractmethod
    def sddmm(self, dy_TO: Tensor, x_TI: Tensor, layout: Layout) -> Tensor:
        """dW = dY^T X at the units of `layout` only, in `layout.values_shape`."""

    def backward(self, values: Tensor, layout: Layout, dy_TO: Tensor, x_TI: Tensor, needs: Needs) -> Gradients:
        """The gradients that are needed; x_TI is read for dW only."""
        return Gradients(
            self.spmm_t(values, layout, dy_TO) if needs.x else None,
            self.sddmm(dy_TO, x_TI, layout) if needs.values else None,
            dy_TO.sum(0) if needs.bias else None,
        )

    def mlp_refusal(self, layouts: Sequence[Layout], activation: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot compute such an MLP at once; None where it can.

        layouts: of layers that it serves: up, down and, where gated, gate. activation: one of kernels/mlp.py. dtype:
        that of the activations.
        """
        return "it computes MLPs layer by layer"

    def mlp_pays(self, layouts: Sequence[Layout], keeps: str | None, tokens: int) -> bool:
        """Whether an MLP takes less time at once than layer by layer. Asked where it is not refused.

        keeps: of the hidden layer from forward to backward, one of kernels/mlp.py; None where no backward follows.
        """
        return True

    def mlp_forward(
        self, weights: Sequence[Weight], x_TI: Tensor, activation: str, kept: Tensor | None = None
    ) -> Tensor:
        """Y = f(X Wu^T + bu) Wd^T + bd or, gated, (f(X Wg^T + bg) * (X Wu^T + bu)) Wd^T + bd, a new (tokens, out).

        kept: (tokens, hidden), or (tokens, 2 hidden) where gated, to be filled with what `mlp_backward` of the same
        inputs wants of the hidden layer, in an order of the backend's own; in one of the dtypes of `mlp_keeps`.
        """
        raise NotImplementedError(self.name)

    def mlp_backward(
        self, weights: Sequence[Weight], dy_TO: Tensor, x_TI: Tensor, activation: str, kept: Tensor | None = None
    ) -> MlpGradients:
        """All gradients of `mlp_forward` but that of the output's bias; kept: what it filled, or None."""
        raise NotImplementedError(self.name)

    def token_refusal(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """Why this backend cannot prepare the product of such a layer, one that it serves, for single tokens."""
        return "it has no product for single tokens"

    def token_product(self, values: Tensor, layout: Layout, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`spmm` of x (1, in), for as long as these tensors stay as they are; may return one buffer each time."""
        raise NotImplementedError(self.name)

    def token_blocks(
        self, blocks: Sequence[TokenBlock], shape: TokenShape, cache: Tensor
    ) -> Callable[[Tensor, int], Tensor] | None:
        """All blocks of a decoder for single tokens at once, or None where this backend has no such thing.

        Called with x (1, width) and a position, it gives what the last block does, in one buffer each time. cache:
        (layer, 2, 1, kv head, position, head size), keys and values.
        """
        return None

    def attention_refusal(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> str | None:
        """Why this backend does not compute causal attention over such sequences; None where it does, and pays."""
        return "it has no attention"

    def attention(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> Tensor:
        """softmax(scale q k^T) v, each query with the keys up to its own, with gradients: (batch, heads, tokens, size).

        k and v have a number of heads that divides that of q: each is shared by as many heads in a row.
        """
        raise NotImplementedError(self.name)

    def losses_refusal(self, logits_TV: Tensor, teacher_TV: Tensor | None) -> str | None:
        """Why this backend does not compute the losses of such logits; None where it does.

        Asked of (tokens, vocabulary) that are not empty, with a teacher's of as wide a vocabulary and no more tokens,
        for targets (tokens,) of int64, all on one device.
        """
        return "it has no losses"

    def losses(self, given: LossInputs) -> LossSums:
        """Sums over tokens of -log softmax(logits)[target] and of KL(softmax(teacher) || softmax(logits))."""
        raise NotImplementedError(self.name)

    def limits(self, device: torch.device) -> Limits | str:
        """What a device does at most, or why this backend cannot tell."""
        return f"backend '{self.name}' does not measure what {device.type} does at most"
