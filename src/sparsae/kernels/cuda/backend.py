"""Sparse layers on an NVIDIA GPU: dense products around Triton kernels, or products of blocks alone.

Which of the two a layer gets is in `thresholds.py`. Without Triton the reference computes in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsae.core.topology import Topology
from sparsae.kernels.availability import DTYPES, absence, interpreted
from sparsae.kernels.backend import Backend, Gradients, Layout, LossInputs, LossSums, Needs
from sparsae.kernels.cuda.index import index_of, make_index, run_starts
from sparsae.kernels.cuda.thresholds import by_blocks, by_tiles
from sparsae.kernels.structures import poisoned


class Cuda(Backend):
    """float32, bfloat16 and float16, summed up in float32; the interpreter on a CPU, where it is asked for by name."""

    name = "cuda"
    casts = True
    compares = True

    def missing(self, device: torch.device) -> str | None:
        return absence() if device.type == "cuda" else None

    def refusal(self, unit: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" and not (device.type == "cpu" and absence() is None and interpreted()):
            return f"it runs on CUDA, not on {device.type}"
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
        return absence()

    def pays(self, layout: Layout, dtype: torch.dtype) -> bool:
        return layout.indices.device.type == "cuda"

    def derive(self, topology: Topology) -> list[Tensor]:
        """The structures of `Index`."""
        return list(make_index(Layout(topology.shape, topology.unit, topology.indices)))

    def spmm(self, values: Tensor, layout: Layout, x_TI: Tensor, bias: Tensor | None = None) -> Tensor:
        if by_blocks(layout):
            from sparsae.kernels.cuda import blocks

            if layout.seen is not None:
                values = poisoned(values, layout.seen, layout.indices)
            return blocks.spmm(values, layout, index_of(layout), x_TI, bias)
        from sparsae.kernels.cuda import dense

        weight_IO = dense.scatter(values, layout, index_of(layout), x_TI.dtype)
        return x_TI @ weight_IO if bias is None else torch.addmm(bias, x_TI, weight_IO)

    def spmm_t(self, values: Tensor, layout: Layout, dy_TO: Tensor) -> Tensor:
        if by_blocks(layout):
            from sparsae.kernels.cuda import blocks

            return blocks.spmm_t(values, layout, index_of(layout), dy_TO)
        from sparsae.kernels.cuda import dense

        return dy_TO @ dense.scatter(values, layout, index_of(layout), dy_TO.dtype).T

    def sddmm(self, dy_TO: Tensor, x_TI: Tensor, layout: Layout) -> Tensor:
        if not by_tiles(layout, dy_TO.dtype):
            return _gradient(dy_TO, x_TI, layout, dy_TO.dtype)
        # Units that a probe looks at may come in any order, and asking whether they do would wait for the device.
        ordered, order = torch.sort(layout.indices)
        gradient = _gradient(dy_TO, x_TI, layout._replace(indices=ordered, derived=()), dy_TO.dtype)
        return torch.empty_like(gradient).scatter_(0, order, gradient)

    def backward(self, values: Tensor, layout: Layout, dy_TO: Tensor, x_TI: Tensor, needs: Needs) -> Gradients:
        return Gradients(
            self.spmm_t(values, layout, dy_TO) if needs.x else None,
            _gradient(dy_TO, x_TI, layout, values.dtype) if needs.values else None,
            dy_TO.sum(0) if needs.bias else None,
        )

    def losses_refusal(self, logits_TV: Tensor, teacher_TV: Tensor | None) -> str | None:
        for tensor in (logits_TV, teacher_TV):
            if tensor is not None and not (tensor.is_cuda and tensor.dtype in DTYPES and tensor.is_contiguous()):
                return "its logits are float32, bfloat16 or float16 on CUDA, row after row"
        return absence()

    def losses(self, given: LossInputs) -> LossSums:
        from sparsae.kernels.fused.loss import losses_and_gradient

        logits_TV, targets_T, teacher_TV, ignore_index, weights, gradient = given
        return LossSums(*losses_and_gradient(logits_TV, targets_T, teacher_TV, ignore_index, *weights, gradient))


BACKEND = Cuda()


def _gradient(dy_TO: Tensor, x_TI: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """dW of `dtype` at the units of a layout: single weights of half precision in ascending order, others in any."""
    if by_blocks(layout):
        from sparsae.kernels.cuda import blocks

        return blocks.sddmm(dy_TO, x_TI, layout, dtype)
    from sparsae.kernels.cuda import dense

    if by_tiles(layout, dy_TO.dtype):
        starts = layout.derived[0] if layout.derived else run_starts(layout)
        return dense.gradient_by_tiles(dy_TO, x_TI, layout, starts, dtype)
    return dense.gather(x_TI.T @ dy_TO, layout, dtype)
