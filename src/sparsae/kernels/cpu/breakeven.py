"""Where the native kernels beat dense arithmetic over the same storage.

Thresholds, and no measurement at run time: two backends round differently, so a choice that hung on the clock would
give a run other numbers when it is repeated or resumed. `sparsae bench kernels` measures them. Above them a layer is
scattered and multiplied densely.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from sparsae.kernels.backend import Layout
from sparsae.kernels.cpu import library

# Densities of float32 layers up to which neither a forward pass nor a training step was measured to take longer than
# dense products do, with AVX-512 and with AVX2: of single weights; of blocks whose sides are multiples of 4, which the
# kernels take four weights at a time; of other blocks, by their smaller side and by their weights.
UNSTRUCTURED, BLOCKS, ODD_BLOCKS, THIN, SMALL = 0.36, 0.45, 0.25, 0.15, 0.1
# Densities of MLPs up to which forward and backward were not measured to take longer at once than layer by layer, with
# AVX-512 and with AVX2, by (gated, whether the hidden layer is computed again); of single weights, and of blocks.
MLP = {(False, True): 0.36, (False, False): 0.36, (True, True): 0.1, (True, False): 0.2}
MLP_BLOCKS = {(False, True): 0.15, (False, False): 0.15, (True, True): 0.05, (True, False): 0.05}
# Tokens from which forward alone takes less time at once, at every density, by whether the MLP is gated.
MLP_TOKENS = {False: 512, True: 1024}
# By instruction set: tokens from which attention takes less time than torch's, with heads of up to ATTENTION_SIZE. The
# others were not measured.
ATTENTION, ATTENTION_SIZE = {"avx512": 128, "avx2": 128}, 128


def pays(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the native kernels take less time than dense products, with and without gradients."""
    weights = layout.shape[0] * layout.shape[1]
    density = layout.indices.numel() * layout.unit[0] * layout.unit[1] / max(weights, 1)
    return dtype == torch.float32 and density <= highest_density(layout.unit)


def highest_density(unit: tuple[int, int]) -> float:
    """Up to which the native kernels pay, for units of this shape."""
    if unit == (1, 1):
        return UNSTRUCTURED
    if unit[0] % 4 == unit[1] % 4 == 0:
        return BLOCKS
    if min(unit) >= 4:
        return ODD_BLOCKS
    return THIN if unit[0] * unit[1] >= 4 else SMALL


def fusing_pays(layouts: Sequence[Layout], keeps: str | None, tokens: int) -> bool:
    """Whether an MLP takes less time at once than layer by layer.

    layouts: of up, down and, where gated, gate. keeps: what forward keeps of the hidden layer for backward; None: no
    backward follows, and then the number of tokens decides.
    """
    gated = len(layouts) > 2
    if keeps is None:
        return tokens >= MLP_TOKENS[gated]
    active = sum(layout.indices.numel() * layout.unit[0] * layout.unit[1] for layout in layouts)
    weights = sum(layout.shape[0] * layout.shape[1] for layout in layouts)
    limits = MLP if layouts[0].unit == (1, 1) else MLP_BLOCKS
    return active <= limits[gated, keeps == "nothing"] * weights


def attention_pays(tokens: int, size: int) -> bool:
    """Whether causal attention over whole sequences takes less time than torch's, with and without gradients."""
    least = None if library.absence() else ATTENTION.get(library.isa())
    return least is not None and tokens >= least and size <= ATTENTION_SIZE


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has matrix units (AMX) for bfloat16: dense products are then faster than these kernels."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "amx_bf16" in information.read_text(errors="replace")
