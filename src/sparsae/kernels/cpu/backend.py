"""Native kernels on the CPU: unstructured and block units, faster than a dense layer from about two thirds sparsity on.

Values and results stay as PyTorch has them, row-major activations and values in unit order; csrc/ tells how the
products are computed. float32, or bfloat16 with float32 sums; other dtypes are computed by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsae.core.topology import Topology
from sparsae.kernels.backend import (
    Backend,
    Gradients,
    Layout,
    Limits,
    LossInputs,
    LossSums,
    MlpGradients,
    Needs,
    TokenBlock,
    TokenShape,
    Weight,
)
from sparsae.kernels.cpu import breakeven, native, roofline
from sparsae.kernels.cpu.attention import causal_attention
from sparsae.kernels.cpu.losses import losses
from sparsae.kernels.cpu.token import Blocks
from sparsae.kernels.reference import Reference


class Cpu(Backend):
    """The kernels of csrc/, and the dense path where they would not pay."""

    name = "cpu"
    mlp_keeps = native.DTYPES

    def __init__(self) -> None:
        self._dense = Reference()

    def missing(self, device: torch.device) -> str | None:
        return native.absence() if device.type == "cpu" else None

    def refusal(self, unit: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype not in native.DTYPES:
            return f"it computes in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
        return native.absence()

    def pays(self, layout: Layout, dtype: torch.dtype) -> bool:
        return breakeven.pays(layout, dtype)

    def derive(self, topology: Topology) -> list[Tensor]:
        """The structures of `native.Index`. Raises ValueError for indices out of range or order."""
        return list(native.make_index(Layout(topology.shape, topology.unit, topology.indices)))

    def spmm(self, values: Tensor, layout: Layout, x_TI: Tensor, bias: Tensor | None = None) -> Tensor:
        if not is_native(x_TI.dtype):
            return self._dense.spmm(values, layout, x_TI, bias)
        bias = None if bias is None else bias.float().contiguous()
        return native.forward(values.float().contiguous(), layout, native.index_of(layout), x_TI, bias)

    def spmm_t(self, values: Tensor, layout: Layout, dy_TO: Tensor) -> Tensor:
        dx_TI = self.backward(values, layout, dy_TO, dy_TO, Needs(x=True, values=False, bias=False)).x
        assert dx_TI is not None
        return dx_TI

    def sddmm(self, dy_TO: Tensor, x_TI: Tensor, layout: Layout) -> Tensor:
        if not is_native(dy_TO.dtype):
            return self._dense.sddmm(dy_TO, x_TI, layout)
        order = None
        if bool((layout.indices[1:] <= layout.indices[:-1]).any()):
            units, order = torch.unique(layout.indices, return_inverse=True)
            layout = layout._replace(indices=units)
        dvalues = native.backward(layout, native.point_columns(layout), dy_TO, x_TI=x_TI).values
        assert dvalues is not None
        return (dvalues if order is None else dvalues[order]).to(dy_TO.dtype)

    def backward(self, values: Tensor, layout: Layout, dy_TO: Tensor, x_TI: Tensor, needs: Needs) -> Gradients:
        if not is_native(dy_TO.dtype):
            return self._dense.backward(values, layout, dy_TO, x_TI, needs)
        dx_TI, dvalues, dbias = native.backward(
            layout,
            layout.derived[0] if layout.derived else native.point_columns(layout),
            dy_TO,
            values=values.float().contiguous() if needs.x else None,
            x_TI=x_TI if needs.values else None,
            bias=needs.bias,
        )
        return Gradients(
            dx_TI,
            None if dvalues is None else dvalues.to(values.dtype),
            None if dbias is None else dbias.to(dy_TO.dtype),
        )

    def mlp_refusal(self, layouts: Sequence[Layout], activation: str, dtype: torch.dtype) -> str | None:
        if not is_native(dtype):
            return f"it multiplies {str(dtype).removeprefix('torch.')} densely here"
        if activation not in native.ACTIVATIONS:
            return f"its activation is {activation}"
        return native.mlp_refusal(layouts)

    def mlp_pays(self, layouts: Sequence[Layout], keeps: str | None, tokens: int) -> bool:
        return breakeven.fusing_pays(layouts, keeps, tokens)

    def mlp_forward(
        self, weights: Sequence[Weight], x_TI: Tensor, activation: str, kept: Tensor | None = None
    ) -> Tensor:
        return native.mlp_forward([_in_float32(weight) for weight in weights], x_TI, activation, kept)

    def mlp_backward(
        self, weights: Sequence[Weight], dy_TO: Tensor, x_TI: Tensor, activation: str, kept: Tensor | None = None
    ) -> MlpGradients:
        return native.mlp_backward([_in_float32(weight) for weight in weights], dy_TO, x_TI, activation, kept)

    def token_refusal(self, layout: Layout, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float32 else "it multiplies single tokens in float32"

    def token_product(self, values: Tensor, layout: Layout, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        return native.Product(values, layout, native.index_of(layout), bias)

    def token_blocks(
        self, blocks: Sequence[TokenBlock], shape: TokenShape, cache: Tensor
    ) -> Callable[[Tensor, int], Tensor] | None:
        return Blocks(blocks, shape, cache)

    def attention_refusal(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> str | None:
        if any(t.device.type != "cpu" or t.dtype is not torch.float32 for t in (q_BHTD, k_BGTD, v_BGTD)):
            return "it attends in float32 on the CPU"
        batch, heads, tokens, size = q_BHTD.shape
        groups = k_BGTD.shape[1]
        if heads % groups or not k_BGTD.shape == v_BGTD.shape == (batch, groups, tokens, size):
            return "keys and values are not those of the same tokens"
        if batch * groups < torch.get_num_threads():
            return "there are fewer heads than threads"
        return None if breakeven.attention_pays(tokens, size) else "torch's attention is faster"

    def attention(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> Tensor:
        return causal_attention(q_BHTD, k_BGTD, v_BGTD, scale)

    def losses_refusal(self, logits_TV: Tensor, teacher_TV: Tensor | None) -> str | None:
        for tensor in (logits_TV, teacher_TV):
            if tensor is None:
                continue
            if tensor.device.type != "cpu" or tensor.dtype is not torch.float32 or not tensor.is_contiguous():
                return "its logits are float32 on the CPU, row after row"
        return native.absence()

    def losses(self, given: LossInputs) -> LossSums:
        return losses(given)

    def limits(self, device: torch.device) -> Limits | str:
        if device.type != "cpu":
            return super().limits(device)
        return native.absence() or Limits(native.isa(), roofline.flops, roofline.bandwidth)


BACKEND = Cpu()


def is_native(dtype: torch.dtype) -> bool:
    """Whether products of this dtype go to the kernels; under autocast it is not the values' own."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not breakeven.multiplies_bfloat16())


def _in_float32(weight: Weight) -> Weight:
    bias = None if weight.bias is None else weight.bias.float().contiguous()
    return Weight(weight.values.float().contiguous(), bias, weight.layout)
