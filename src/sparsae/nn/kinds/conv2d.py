"""`nn.Conv2d`, as a product of its weight, (out, in * height * width of the kernel), and unfolded patches.

Patches take as many times the input's memory as the kernel has positions, over the square of the stride. A grouped
convolution is several products of other shapes; it stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsae.nn.kinds.kind import KINDS, Kind, subclass_refusal
from sparsae.nn.tracing import transformed

if TYPE_CHECKING:
    from sparsae.nn.linear import SparseLinear


@KINDS.register
@dataclass(frozen=True)
class Conv2d(Kind):
    """A convolution with these arguments of `nn.Conv2d`'s; the rest is in the layer.

    The inputs of the matrix are numbered as the weight lies: all positions of a kernel, channel by channel.
    """

    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if module.groups != 1:
            return "a grouped convolution"
        return subclass_refusal(module, nn.Conv2d)

    @classmethod
    def of(cls, module: Any) -> Self:
        return cls(
            module.in_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.padding_mode,
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.kernel_size

    def split(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        return {"": tensor.view(tensor.shape[0], -1)}

    def join(self, weight: str, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices[""].unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, layer: SparseLinear, x: Tensor) -> Tensor:
        """x: (N, in, height, width), or without N, to (N, out, height, width). Raises ValueError for other channels."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be (N, {self.in_channels}, height, width)")
        if x.dim() == 3:
            return self.forward(layer, x[None])[0]
        padding, sides = self.padding, self._sides()
        if isinstance(padding, str) or self.padding_mode != "zeros":
            x = functional.pad(x, sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding, sides = (0, 0), [0, 0, 0, 0]
        # Which nobody can ask under a transform of torch.func.
        is_last = not transformed() and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        size = [
            (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for length, before, after, kernel, dilation, stride in zip(
                x.shape[2:], sides[2::-2], sides[3::-2], self.kernel_size, self.dilation, self.stride, strict=True
            )
        ]
        patches_NIP = functional.unfold(x, self.kernel_size, self.dilation, padding, self.stride)
        y_NPO = layer.product(patches_NIP.transpose(1, 2))
        y = y_NPO.transpose(1, 2).unflatten(2, size)
        # In the memory order of x, as a convolution gives it: others may take views of it.
        return y.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)

    def release(self, twin: Any) -> nn.Module:
        dense = nn.Conv2d(
            self.in_channels,
            twin.out_features,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=twin.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        dense.bias = twin.bias
        return dense

    def _sides(self) -> list[int]:
        """What is added to the left, to the right, above and below."""
        if self.padding == "valid":
            return [0, 0, 0, 0]
        if isinstance(self.padding, str):  # "same": the rest of an odd number comes after
            extents = [
                dilation * (kernel - 1) for kernel, dilation in zip(self.kernel_size, self.dilation, strict=True)
            ]
            return [side for extent in reversed(extents) for side in (extent // 2, extent - extent // 2)]
        return [side for amount in reversed(self.padding) for side in (amount, amount)]
