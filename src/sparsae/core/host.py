"""Between the CPU and a device: what an update has to know comes together, what it has drawn goes ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, each device waited for once. Those that are there already are returned as they are."""
    found = [_on_its_way(tensor.detach()) for tensor in tensors]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    # Pinned memory is scarce, and some of this is kept for long.
    return [tensor.clone() for tensor in found] if devices else found


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, which is not waited for where the tensor is the CPU's."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _on_its_way(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    # Only into pinned memory does a copy not wait.
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
