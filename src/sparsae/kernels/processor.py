"""How this process computes on the processor."""

from __future__ import annotations

import torch


def set_up_processor(threads: int | None = None) -> None:
    """Compute on so many threads (None: on as many as now), and take numbers too small to be normal for zeros.

    Such numbers (below 1.2e-38 in float32) take a processor some hundred times as long, and a model makes many where
    its attention is certain of itself: what else has a probability of e^-90 gets a gradient of that size, which every
    product of the backward pass meets. A thread that torch starts takes this from the one that starts it, so this
    comes before what is computed in parallel.
    """
    torch.set_flush_denormal(True)  # False, and nothing else, on processors that cannot
    if threads is not None:
        torch.set_num_threads(threads)
