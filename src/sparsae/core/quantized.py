"""torchao's tensors of few bits, as optimizers keep them: read as floats, and quantized again."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def floats_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a quantized one its float form."""
    return tensor.dequantize() if is_quantized(tensor) else tensor.detach()


def is_quantized(tensor: Tensor) -> bool:
    """Whether it is one of torchao's: blocks of few bits, with a scale for each."""
    return hasattr(tensor, "block_size") and hasattr(type(tensor), "zeros")


def quantized_as(quantized: Tensor, floats: Tensor) -> Tensor:
    """As torchao keeps it: in the blocks of `quantized` where they divide it, else as it is."""
    if not is_quantized(quantized):
        return floats
    kind: Any = type(quantized)
    size: int = quantized.block_size  # type: ignore[attr-defined]
    if not floats.numel() or floats.numel() % size:
        return floats.to(quantized.dtype)
    signed = [quantized.signed] if hasattr(quantized, "signed") else []
    made: Tensor = kind.zeros(floats.shape, *signed, size, floats.device, dtype=quantized.dtype)
    return made.copy_(floats)
