"""Whether Triton is here, and whether its kernels run on a GPU or in its interpreter.

With TRITON_INTERPRET=1 in the environment Triton computes on the CPU, a thousand times slower: for tests of the kernels
without a GPU.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def absence() -> str | None:
    """Why there are no Triton kernels; None where there are."""
    return None if find_spec("triton") else "Triton is not installed (pip install 'sparsae[triton]')"


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted: decided by the environment when Triton is first imported, as Triton does."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies: float32 as torch's own products of this process do (set_float32_matmul_precision)."""
    allowed = dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"
