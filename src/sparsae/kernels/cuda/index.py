"""Index structures, made on the device from the sorted units in O(count), without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsae.kernels.backend import Layout
from sparsae.kernels.cuda.thresholds import TILE_ROWS, by_blocks


class Index(NamedTuple):
    """Where runs of units start, and blocks in row order.

    starts: (grid columns x row tiles + 1,) int64, the first unit at or behind the top of each row tile of each grid
    column; a run of units in one column and one row tile is starts[k] to starts[k + 1]. Single weights have row tiles
    of `TILE_ROWS`, blocks one a column. by_row: (count,) int32, positions in `indices` in row order, and row_ptr:
    (grid rows + 1,) int64, where rows start in it: both (0,) where no kernel goes by rows.
    """

    starts: Tensor
    by_row: Tensor
    row_ptr: Tensor


def row_tiles(layout: Layout) -> int:
    """Row tiles of a grid column."""
    return -(-layout.grid_rows // TILE_ROWS) if layout.unit == (1, 1) else 1


def make_index(layout: Layout) -> Index:
    """All structures of sorted units."""
    indices = layout.indices
    starts, nothing = run_starts(layout), indices.new_empty(0)
    if not by_blocks(layout):
        return Index(starts, nothing, nothing)
    rows, by_row = torch.sort(indices % layout.grid_rows, stable=True)
    row_ptr = torch.searchsorted(rows, torch.arange(layout.grid_rows + 1, dtype=rows.dtype, device=rows.device))
    return Index(starts, by_row.to(torch.int32), row_ptr)


def run_starts(layout: Layout) -> Tensor:
    """`Index.starts` alone; units may be repeated."""
    indices, tiles, device = layout.indices, row_tiles(layout), layout.indices.device
    columns = layout.shape[1] // layout.unit[1]
    tops = torch.arange(columns, device=device)[:, None] * layout.grid_rows
    tops = tops + torch.arange(tiles, device=device) * TILE_ROWS
    # The number of all units may be one more than the dtype of the indices holds.
    starts = torch.searchsorted(indices, tops.flatten().to(indices.dtype))
    return torch.cat([starts, starts.new_full((1,), indices.numel())])


def index_of(layout: Layout) -> Index:
    """The structures that come with a layout, or new ones."""
    return Index(*layout.derived) if layout.derived else make_index(layout)
