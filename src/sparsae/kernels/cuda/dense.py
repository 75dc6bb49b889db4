"""Unstructured weights: storage stays sparse, arithmetic is dense.

The values are scattered into one dense matrix, which cuBLAS multiplies with. It is taken from torch's allocator for one
product and given back, so layers of one shape share it, whatever stream, thread or CUDA graph they run in. One kernel
fills it: each program clears one row of W^T and writes the row's values over it, cast on the way. Clearing just what
was written before, after the product, would move no less: at 90 % sparsity four in five sectors (32 bytes, 16 entries)
of the matrix hold a value, the indices would be read again, and the matrix would have to stay allocated.

The gradient is computed in tiles of 128 x 128 that stay in registers; of each, the entries of active units are stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsae.kernels.availability import precision
from sparsae.kernels.backend import Layout
from sparsae.kernels.cuda.index import Index, row_tiles
from sparsae.kernels.cuda.launch import Tuned
from sparsae.kernels.cuda.thresholds import TILE_COLUMNS, TILE_ROWS

_CHUNK = 1024
# Tokens that one multiplication of tiles sums over, and entries of a column that are gathered at once.
_TOKENS, _SLOTS = 64, 16


def scatter(values: Tensor, layout: Layout, index: Index, dtype: torch.dtype) -> Tensor:
    """W^T, (in, out), with zeros where no unit is active, and NaN for one that is another in `layout.seen`."""
    out_features, in_features = layout.shape
    weight_IO = torch.empty(in_features, out_features, dtype=dtype, device=values.device)
    if weight_IO.numel():
        _scatter[(in_features,)](
            *(values.contiguous(), layout.indices, layout.indices if layout.seen is None else layout.seen),
            *(index.starts, weight_IO),
            *(out_features, layout.grid_rows, row_tiles(layout)),
            B_OUT=layout.unit[0],
            B_IN=layout.unit[1],
            CHUNK=min(_CHUNK, triton.next_power_of_2(out_features)),
            COMPARED=layout.seen is not None,
        )
    return weight_IO


def gather(gradient_IO: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The units of a dense (in, out) matrix, in `layout.values_shape`; units in any order, repeated or not."""
    found = torch.empty(layout.values_shape, dtype=dtype, device=gradient_IO.device)
    if found.numel():
        _gather[(triton.cdiv(found.numel(), _CHUNK),)](
            *(gradient_IO, layout.indices, found, found.numel(), layout.shape[0], layout.grid_rows),
            B_OUT=layout.unit[0],
            B_IN=layout.unit[1],
            CHUNK=_CHUNK,
        )
    return found


def gradient_by_tiles(dy_TO: Tensor, x_TI: Tensor, layout: Layout, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """dY^T X at single weights in ascending order, repeated or not: (count,) of `dtype`, summed up in float32.

    starts: see `Index`.
    """
    out_features, in_features = layout.shape
    found = torch.empty(layout.values_shape, dtype=dtype, device=dy_TO.device)
    if found.numel():
        tiles = row_tiles(layout)
        _by_tiles(
            lambda meta: (triton.cdiv(in_features, TILE_COLUMNS) * tiles,),
            *(dy_TO.contiguous(), x_TI.contiguous(), layout.indices, starts, found),
            *(x_TI.shape[0], out_features, in_features, tiles, x_TI.shape[0].bit_length()),
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            TOKENS=_TOKENS,
            SLOTS=_SLOTS,
            PRECISION=precision(dy_TO.dtype),
        )
    return found


@triton.jit
def _scatter(
    values,
    indices,
    seen,
    starts,
    weight,
    out_features,
    grid_rows,
    row_tiles,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    # One row of W^T: one input, which is the one at `within` in the units of a grid column.
    feature = tl.program_id(0).to(tl.int64)
    column, within = feature // B_IN, feature % B_IN
    row = weight + feature * out_features
    lanes = tl.arange(0, CHUNK)
    zeros = tl.zeros([CHUNK], weight.dtype.element_ty)
    for first in range(0, out_features, CHUNK):
        tl.store(row + first + lanes, zeros, mask=first + lanes < out_features)
    # The values are written by other threads than those that cleared their places.
    tl.debug_barrier()
    end = tl.load(starts + (column + 1) * row_tiles) * B_OUT
    for first in range(tl.load(starts + column * row_tiles) * B_OUT, end, CHUNK):
        entry = first + lanes
        active = entry < end
        position, offset = entry // B_OUT, entry % B_OUT
        unit = tl.load(indices + position, mask=active, other=0)
        value = tl.load(values + (position * B_OUT + offset) * B_IN + within, mask=active, other=0.0)
        if COMPARED:
            value = tl.where(tl.load(seen + position, mask=active, other=0) == unit, value, float("nan"))
        output = (unit - column * grid_rows) * B_OUT + offset
        tl.store(row + output, value.to(weight.dtype.element_ty), mask=active)


@triton.jit
def _gather(
    gradient,
    indices,
    found,
    size,
    out_features,
    grid_rows,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = entry < size
    unit = tl.load(indices + entry // (B_OUT * B_IN), mask=inside, other=0).to(tl.int64)
    output = unit % grid_rows * B_OUT + entry // B_IN % B_OUT
    feature = unit // grid_rows * B_IN + entry % B_IN
    value = tl.load(gradient + feature * out_features + output, mask=inside, other=0.0)
    tl.store(found + entry, value.to(found.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["case"])
def _tile_gradient(
    dy,
    x,
    indices,
    starts,
    found,
    tokens,
    out_features,
    in_features,
    row_tiles,
    case,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    columns = tile // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    top = tile % row_tiles * ROWS
    rows = top + tl.arange(0, ROWS)
    # The units of each column in this tile; a tile without any costs nothing.
    run = starts + columns.to(tl.int64) * row_tiles + tile % row_tiles
    first = tl.load(run, mask=columns < in_features, other=0)
    end = tl.load(run + 1, mask=columns < in_features, other=0)
    longest = tl.max(end - first, 0)
    # Numbers of 64 bits are kept out of the tiles of addresses, which would not fit into the registers.
    token = tl.arange(0, TOKENS)
    x_place = token[None, :] * in_features + columns[:, None]
    dy_place = token[:, None] * out_features + rows[None, :]
    gradient = tl.zeros([COLUMNS, ROWS], tl.float32)
    for begin in range(0, tl.where(longest > 0, tokens, 0), TOKENS):
        here = token < tokens - begin
        x_IT = tl.load(x + x_place, mask=here[None, :] & (columns[:, None] < in_features), other=0.0)
        dy_TO = tl.load(dy + dy_place, mask=here[:, None] & (rows[None, :] < out_features), other=0.0)
        gradient = tl.dot(x_IT, dy_TO, gradient, input_precision=PRECISION)
        x += TOKENS * in_features
        dy += TOKENS * out_features
    for slot in range(0, longest, SLOTS):
        position = first[:, None] + slot + tl.arange(0, SLOTS)[None, :]
        active = position < end[:, None]
        unit = tl.load(indices + position, mask=active, other=0).to(tl.int64)
        row = tl.where(active, unit - columns[:, None].to(tl.int64) * out_features - top, 0)
        value = tl.gather(gradient, row.to(tl.int32), 1)
        tl.store(found + position, value.to(found.dtype.element_ty), mask=active)


_by_tiles = Tuned(_tile_gradient, [({}, 8, stages) for stages in (3, 4, 2)], ["case", "out_features", "in_features"])
