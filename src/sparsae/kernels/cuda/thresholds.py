"""Which way a product goes on CUDA: by a table, never by the clock, so that a repeated run rounds alike.

Nothing in it was measured. The numbers follow from an estimate for an H100: a block kernel reads its inputs from the L2
cache (5 TB/s) once for each block, b multiply-adds for each element, so that blocks of width b reach about
b x 5.5 TFLOP/s where dense bfloat16 reaches 600. `benchmarks/gpu.sh kernels` measures both ways.
"""

from __future__ import annotations

import torch

from sparsae.kernels.backend import Layout

# Densities up to which block kernels take less time than dense products, by the smaller side of the block.
BLOCKS = {16: 0.1, 32: 0.2, 64: 0.4, 128: 0.6}
# Sides of the tiles of a dense gradient that is gathered from registers: rows (outputs) and columns (inputs).
TILE_ROWS, TILE_COLUMNS = 128, 128


def by_blocks(layout: Layout) -> bool:
    """Whether a product is computed block by block; else densely. Blocks that have no kernel always are the latter."""
    if any(side not in BLOCKS for side in layout.unit):
        return False
    units = (layout.shape[0] // layout.unit[0]) * (layout.shape[1] // layout.unit[1])
    return layout.indices.numel() <= BLOCKS[min(layout.unit)] * units


def by_tiles(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether a gradient is gathered from tiles in registers; else from a dense gradient that cuBLAS writes.

    dtype: of the products. In float32 Triton does without matrix units, and is slower than cuBLAS.
    """
    return layout.unit == (1, 1) and dtype != torch.float32
