"""How fast the arithmetic of a machine could be at best: what achieved operations a second are held against."""

from __future__ import annotations

import torch

from sparsae.config.training import TrainingConfig
from sparsae.core.ranks import ranks

# Dense bfloat16 operations a second, as published, by how CUDA's name of a device begins; the longest that fits holds.
_BFLOAT16 = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}
# Others of these families, whose numbers are their own.
_OTHERS = ("NVIDIA A10G", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D")


def peak_flops(settings: TrainingConfig, device: torch.device) -> float | None:
    """Operations a second of all devices that train together; None where it is not known.

    It is training.peak_flops of each, or for arithmetic in bfloat16 what is published for a CUDA device of this name.
    Of a CPU nothing is published that a program could know.
    """
    each = settings.peak_flops
    if each is None and device.type == "cuda" and settings.precision == "bfloat16":
        each = published(torch.cuda.get_device_name(device))
    return None if each is None else each * ranks().count


def published(name: str) -> float | None:
    """Dense bfloat16 operations a second of a CUDA device of this name; None where it is not known."""
    fitting = [
        known for known in (*_BFLOAT16, *_OTHERS) if name == known or name.startswith((f"{known} ", f"{known}-"))
    ]
    return _BFLOAT16.get(max(fitting, key=len)) if fitting else None
