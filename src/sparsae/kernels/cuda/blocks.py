"""Blocks of 16 to 128: three products that touch active blocks only, summed up in float32.

Forward goes by grid rows, the backward product to the input by grid columns: a program owns one tile of the result, so
nothing is added up through memory. Programs of one tile of tokens run side by side, so that its inputs stay in the L2
cache. The gradient of a block is one program, at any set of blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsae.kernels.availability import precision
from sparsae.kernels.backend import Layout
from sparsae.kernels.cuda.index import Index
from sparsae.kernels.cuda.launch import Tuned

# Tokens that one multiplication of tiles sums over in a gradient.
_TOKENS = 64


def spmm(values: Tensor, layout: Layout, index: Index, x_TI: Tensor, bias: Tensor | None) -> Tensor:
    """Y = X W^T + b, a new (tokens, out) tensor of x's dtype."""
    out_features, in_features = layout.shape
    tokens, rows = x_TI.shape[0], layout.grid_rows
    y_TO = x_TI.new_empty(tokens, out_features)
    if y_TO.numel():
        _spmm(
            lambda meta: (rows * triton.cdiv(tokens, meta["TOKENS"]),),
            *(x_TI.contiguous(), _cast(values, x_TI), layout.indices, index.by_row, index.row_ptr),
            *(y_TO if bias is None else bias.contiguous(), y_TO),
            *(tokens, out_features, in_features, rows, _case(tokens, layout)),
            B_OUT=layout.unit[0],
            B_IN=layout.unit[1],
            HAS_BIAS=bias is not None,
            PRECISION=precision(x_TI.dtype),
        )
    return y_TO


def spmm_t(values: Tensor, layout: Layout, index: Index, dy_TO: Tensor) -> Tensor:
    """dX = dY W, a new (tokens, in) tensor of dy's dtype."""
    out_features, in_features = layout.shape
    tokens, columns = dy_TO.shape[0], in_features // layout.unit[1]
    dx_TI = dy_TO.new_empty(tokens, in_features)
    if dx_TI.numel():
        _spmm_t(
            lambda meta: (columns * triton.cdiv(tokens, meta["TOKENS"]),),
            *(dy_TO.contiguous(), _cast(values, dy_TO), layout.indices, index.starts, dx_TI),
            *(tokens, out_features, in_features, layout.grid_rows, columns, _case(tokens, layout)),
            B_OUT=layout.unit[0],
            B_IN=layout.unit[1],
            PRECISION=precision(dy_TO.dtype),
        )
    return dx_TI


def sddmm(dy_TO: Tensor, x_TI: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """dY^T X at any blocks, in any order, repeated or not: (count, b_out, b_in) of `dtype`."""
    out_features, in_features = layout.shape
    tokens, count = x_TI.shape[0], layout.indices.numel()
    found = torch.empty(layout.values_shape, dtype=dtype, device=dy_TO.device)
    if count:
        _sddmm(
            lambda meta: (count,),
            *(dy_TO.contiguous(), x_TI.contiguous(), layout.indices, found),
            *(tokens, out_features, in_features, layout.grid_rows, _case(tokens, layout)),
            B_OUT=layout.unit[0],
            B_IN=layout.unit[1],
            TOKENS=_TOKENS,
            PRECISION=precision(dy_TO.dtype),
        )
    return found


def _cast(values: Tensor, like: Tensor) -> Tensor:
    # Once, since each is read again for every tile of tokens.
    return values.to(like.dtype).contiguous()


def _case(tokens: int, layout: Layout) -> int:
    # A new choice of configuration where tokens or blocks are twice as many, not at every length of a text.
    return tokens.bit_length() * 64 + layout.indices.numel().bit_length()


@triton.jit(do_not_specialize=["case"])
def _forward(
    x,
    values,
    indices,
    by_row,
    row_ptr,
    bias,
    y,
    tokens,
    out_features,
    in_features,
    grid_rows,
    case,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % grid_rows
    first, token = program // grid_rows * TOKENS, tl.arange(0, TOKENS)
    inside = token[:, None] < tokens - first
    x += first.to(tl.int64) * in_features
    y += first.to(tl.int64) * out_features
    o, i = tl.arange(0, B_OUT), tl.arange(0, B_IN)
    y_TO = tl.zeros([TOKENS, B_OUT], tl.float32)
    for k in range(tl.load(row_ptr + row), tl.load(row_ptr + row + 1)):
        block = tl.load(by_row + k).to(tl.int64)
        column = (tl.load(indices + block) // grid_rows).to(tl.int32)
        weight_IO = tl.load(values + block * (B_OUT * B_IN) + o[None, :] * B_IN + i[:, None])
        x_TI = tl.load(x + token[:, None] * in_features + (column * B_IN + i)[None, :], mask=inside, other=0.0)
        y_TO = tl.dot(x_TI, weight_IO, y_TO, input_precision=PRECISION)
    output = row * B_OUT + o
    if HAS_BIAS:
        y_TO += tl.load(bias + output).to(tl.float32)[None, :]
    tl.store(y + token[:, None] * out_features + output[None, :], y_TO.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["case"])
def _backward(
    dy,
    values,
    indices,
    starts,
    dx,
    tokens,
    out_features,
    in_features,
    grid_rows,
    grid_columns,
    case,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % grid_columns
    first, token = program // grid_columns * TOKENS, tl.arange(0, TOKENS)
    inside = token[:, None] < tokens - first
    dy += first.to(tl.int64) * out_features
    dx += first.to(tl.int64) * in_features
    o, i = tl.arange(0, B_OUT), tl.arange(0, B_IN)
    dx_TI = tl.zeros([TOKENS, B_IN], tl.float32)
    for block in range(tl.load(starts + column), tl.load(starts + column + 1)):
        row = (tl.load(indices + block) % grid_rows).to(tl.int32)
        weight_OI = tl.load(values + block * (B_OUT * B_IN) + o[:, None] * B_IN + i[None, :])
        dy_TO = tl.load(dy + token[:, None] * out_features + (row * B_OUT + o)[None, :], mask=inside, other=0.0)
        dx_TI = tl.dot(dy_TO, weight_OI, dx_TI, input_precision=PRECISION)
    feature = column * B_IN + i
    tl.store(dx + token[:, None] * in_features + feature[None, :], dx_TI.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["case"])
def _gradient(
    dy,
    x,
    indices,
    found,
    tokens,
    out_features,
    in_features,
    grid_rows,
    case,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    unit = tl.load(indices + block)
    row, column = (unit % grid_rows).to(tl.int32), (unit // grid_rows).to(tl.int32)
    o, i = tl.arange(0, B_OUT), tl.arange(0, B_IN)
    output, feature = row * B_OUT + o, column * B_IN + i
    token = tl.arange(0, TOKENS)
    gradient_OI = tl.zeros([B_OUT, B_IN], tl.float32)
    for begin in range(0, tokens, TOKENS):
        here = token < tokens - begin
        dy_OT = tl.load(dy + token[None, :] * out_features + output[:, None], mask=here[None, :], other=0.0)
        x_TI = tl.load(x + token[:, None] * in_features + feature[None, :], mask=here[:, None], other=0.0)
        gradient_OI = tl.dot(dy_OT, x_TI, gradient_OI, input_precision=PRECISION)
        dy += TOKENS * out_features
        x += TOKENS * in_features
    place = found + block * (B_OUT * B_IN) + o[:, None] * B_IN + i[None, :]
    tl.store(place, gradient_OI.to(found.dtype.element_ty))


# Index, then block: a load that waits for another takes two stages for one tile ahead, and four for two.
_BY_TOKENS = [({"TOKENS": 128}, 8, 4), ({"TOKENS": 128}, 4, 6), ({"TOKENS": 64}, 4, 4), ({"TOKENS": 256}, 8, 4)]
_KEY = ["case", "out_features", "in_features", "B_OUT", "B_IN"]
_spmm = Tuned(_forward, _BY_TOKENS, _KEY)
_spmm_t = Tuned(_backward, _BY_TOKENS, _KEY)
_sddmm = Tuned(_gradient, [({}, 4, 3), ({}, 8, 3), ({}, 8, 4)], _KEY)
