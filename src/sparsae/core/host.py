"""What a device has computed, brought to the CPU: the one way by which an update waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, each device waited for once. Those that are there already are returned as they are."""
    found = [_on_its_way(tensor.detach()) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return found


def _on_its_way(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    # Only into pinned memory does a copy not wait.
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
