"""The compiled kernels, as Python sees them.

Everything that the library (`library.py`) is given is checked here, at the boundary: devices, dtypes, shapes,
contiguity, and every index when the index structures are made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparsae.kernels.backend import Gradients, Layout, MlpGradients, Weight
from sparsae.kernels.cpu.library import Mlp, Problem, absence, isa, library, select_isa

__all__ = ["absence", "isa", "select_isa"]

DTYPES = (torch.float32, torch.bfloat16)
# Of the fused MLP, by their number in csrc/problem.hpp.
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")

_ERRORS = {
    1: "unit indices must lie inside the grid of the weight",
    2: "unit indices must be unique and in ascending order",
}


class Index(NamedTuple):
    """The structures beside a topology's indices: where grid columns and rows start, and blocks in row order.

    col_ptr: (grid columns + 1,) int32. row_ptr: (grid rows + 1,) int32. columns: of blocks, (count,) the grid column of
    each in row order, 16 bits wide (as int16) where they fit, else int32. source: of blocks, (count,) int32, its
    position in `indices`. Of single weights, which each pass orders by itself, both are (0,).
    """

    col_ptr: Tensor
    row_ptr: Tensor
    columns: Tensor
    source: Tensor


def make_index(layout: Layout) -> Index:
    """All structures of a layout, in O(count). Raises ValueError for indices out of range or order."""
    rows, columns = layout.grid_rows, layout.shape[1] // layout.unit[1]
    index = Index(
        _empty(columns + 1, dtype=torch.int32),
        _empty(rows + 1, dtype=torch.int32),
        _empty(_in_row_order(layout), dtype=_column_dtype(layout)),
        _empty(_in_row_order(layout), dtype=torch.int32),
    )
    _index(layout, index)
    return index


def index_of(layout: Layout) -> Index:
    """The structures that a layout has, or new ones."""
    return Index(*layout.derived) if layout.derived else make_index(layout)


def point_columns(layout: Layout) -> Tensor:
    """Only where each grid column starts. Raises ValueError for indices out of range or order."""
    col_ptr = _empty(layout.shape[1] // layout.unit[1] + 1, dtype=torch.int32)
    _index(layout, Index(col_ptr, *(_empty(0),) * 3))
    return col_ptr


def forward(values: Tensor, layout: Layout, index: Index, x_TI: Tensor, bias: Tensor | None) -> Tensor:
    """Y = X W^T + b. values and bias: float32; x_TI and the result: float32 or bfloat16."""
    out_features, in_features = layout.shape
    x_TI = x_TI.contiguous()
    _require("x", x_TI, (x_TI.shape[0], in_features))
    y_TO = x_TI.new_empty(x_TI.shape[0], out_features)
    problem = _whole_problem(values, layout, index, bias, x_TI)
    problem.x, problem.y = _pointer(x_TI), _pointer(y_TO)
    _call("sparsae_forward", problem)
    return y_TO


class Product:
    """`forward` for one token at a time, over weights that stay: checked, and brought into row order, once.

    Called with x (1, in) it returns y (1, out), the same buffer every time. Both are float32.
    """

    def __init__(self, values: Tensor, layout: Layout, index: Index, bias: Tensor | None) -> None:
        self._shape = torch.Size((1, layout.shape[1]))
        self._y = _empty(1, layout.shape[0]).zero_()
        self.problem = _whole_problem(values, layout, index, bias, _empty(*self._shape))
        self.problem.y = _pointer(self._y)
        # Kept alive as long as their addresses are used.
        self._keeps = [values, layout, index, bias]
        if layout.unit == (1, 1) and _column_dtype(layout) == torch.int16:
            rows = _row_order(values, layout)
            self.problem.row_ptr, self.problem.columns, self.problem.row_values = map(_pointer, rows)
            self._keeps.append(rows)
        # One token takes microseconds: what is the same for all is looked up once.
        self._forward, self._argument = library().sparsae_forward, ctypes.byref(self.problem)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self._shape or x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}, not float32 {tuple(self._shape)} on cpu")
        x = x.contiguous()
        self.problem.x = x.data_ptr()
        if self._forward(self._argument):
            raise _no_memory()
        return self._y


def backward(
    layout: Layout,
    col_ptr: Tensor,
    dy_TO: Tensor,
    values: Tensor | None = None,
    x_TI: Tensor | None = None,
    *,
    bias: bool = False,
) -> Gradients:
    """dX where values are given, the gradient of the values where x_TI is given, and that of the bias.

    values: float32. dy_TO and x_TI: float32 or bfloat16, the same. dX comes in their dtype, the others in float32.
    """
    out_features, in_features = layout.shape
    dy_TO = dy_TO.contiguous()
    tokens = dy_TO.shape[0]
    _require("dy", dy_TO, (tokens, out_features))
    _require("column starts", col_ptr, (in_features // layout.unit[1] + 1,), torch.int32)
    problem = _problem(layout, col_ptr, dy_TO)
    problem.dy = _pointer(dy_TO)
    dx_TI = dvalues = dbias = None
    if bias:
        dbias = _empty(out_features)
        problem.dbias = _pointer(dbias)
    if values is not None:
        _require("values", values, layout.values_shape, torch.float32)
        dx_TI = dy_TO.new_empty(tokens, in_features)
        problem.values, problem.dx = _pointer(values), _pointer(dx_TI)
    if x_TI is not None:
        x_TI = x_TI.contiguous()
        _require("x", x_TI, (tokens, in_features), dy_TO.dtype)
        dvalues = _empty(*layout.values_shape)
        problem.x, problem.dvalues = _pointer(x_TI), _pointer(dvalues)
    _call("sparsae_backward", problem)
    return Gradients(dx_TI, dvalues, dbias)


def mlp_refusal(layouts: Sequence[Layout]) -> str | None:
    """Why the fused MLP cannot serve these weights; None where it can."""
    if len({layout.unit for layout in layouts}) > 1:
        return "its weights have different units"
    if any(_column_dtype(layout) != torch.int16 or layout.indices.dtype != torch.int32 for layout in layouts):
        return "it is wider than 65,536 features"
    return None


def mlp_forward(weights: Sequence[Weight], x_TI: Tensor, activation: str, kept: Tensor | None = None) -> Tensor:
    """Y = f(X Wu^T + bu) Wd^T + bd, or (f(X Wg^T + bg) * (X Wu^T + bu)) Wd^T + bd.

    weights: up, down and, where gated, gate: in float32, with an `Index` as derived tensors. activation: one of
    ACTIVATIONS. Y is (tokens, out) in the dtype of x_TI. kept: filled with what goes into the activation, in an order
    that `mlp_backward` knows; float32 or bfloat16, (tokens, hidden), or (tokens, 2 hidden) where gated.
    """
    x_TI = x_TI.contiguous()
    mlp = _mlp(weights, x_TI, activation, kept)
    y_TO = x_TI.new_empty(x_TI.shape[0], weights[1].layout.shape[0])
    mlp.down.y = _pointer(y_TO)
    _call("sparsae_mlp_forward", mlp)
    return y_TO


def mlp_backward(
    weights: Sequence[Weight], dy_TO: Tensor, x_TI: Tensor, activation: str, kept: Tensor | None = None
) -> MlpGradients:
    """All gradients of `mlp_forward` but that of the output's bias: dX in the dtype of x_TI, the others in float32.

    kept: what `mlp_forward` filled, with the same instruction set; None: the hidden layer is computed again.
    """
    x_TI, dy_TO = x_TI.contiguous(), dy_TO.contiguous()
    _require("dy", dy_TO, (x_TI.shape[0], weights[1].layout.shape[0]), x_TI.dtype)
    mlp = _mlp(weights, x_TI, activation, kept)
    gradients = MlpGradients(torch.empty_like(x_TI), [_empty(*w.layout.values_shape) for w in weights], [])
    mlp.down.dy, mlp.up.dx = _pointer(dy_TO), _pointer(gradients.x)
    for number, problem in enumerate((mlp.up, mlp.down, mlp.gate)[: len(weights)]):
        problem.dvalues = _pointer(gradients.values[number])
        bias = weights[number].bias
        gradients.biases.append(None if bias is None or number == 1 else torch.empty_like(bias))
        if (dbias := gradients.biases[-1]) is not None:
            problem.dbias = _pointer(dbias)
    _call("sparsae_mlp_backward", mlp)
    return gradients


def _mlp(weights: Sequence[Weight], x_TI: Tensor, activation: str, kept: Tensor | None) -> Mlp:
    (hidden, in_features), down = weights[0].layout.shape, weights[1].layout
    _require("x", x_TI, (x_TI.shape[0], in_features))
    if down.shape[1] != hidden or any(w.layout.shape != weights[0].layout.shape for w in weights[2:]):
        raise ValueError(f"these weights are no MLP: {[w.layout.shape for w in weights]}")
    if (reason := mlp_refusal([w.layout for w in weights])) is not None:
        raise ValueError(f"the fused MLP cannot be used: {reason}")
    up, down_, *gate = [_whole_problem(w.values, w.layout, Index(*w.layout.derived), w.bias, x_TI) for w in weights]
    up.x = _pointer(x_TI)
    mlp = Mlp(up, gate[0] if gate else Problem(), down_, ACTIVATIONS.index(activation), bool(gate))
    if kept is not None:
        if kept.dtype not in DTYPES:
            raise ValueError(f"the native kernels keep float32 or bfloat16, not {kept.dtype}")
        _require("what is kept", kept, (x_TI.shape[0], hidden * (1 + len(gate))))
        mlp.kept, mlp.kept_bfloat16 = _pointer(kept), kept.dtype == torch.bfloat16
    return mlp


def multiply_add(rounds: int, threads: int) -> float:
    """`rounds` of multiply-adds in registers on each of `threads` threads; the floating point operations done."""
    return float(library().sparsae_multiply_add(rounds, threads))


def triad(a_N: Tensor, b_N: Tensor, c_N: Tensor, threads: int) -> None:
    """a = b + 3 c in float32 on `threads` threads, a written past the caches."""
    for name, tensor in (("a", a_N), ("b", b_N), ("c", c_N)):
        _require(name, tensor, tuple(a_N.shape), torch.float32)
    if a_N.data_ptr() % 64:
        raise ValueError("a must begin at a cache line")
    library().sparsae_triad(_pointer(a_N), _pointer(b_N), _pointer(c_N), a_N.numel(), threads)


def _in_row_order(layout: Layout) -> int:
    """Units whose row order is kept."""
    return 0 if layout.unit == (1, 1) else layout.indices.numel()


def _index(layout: Layout, index: Index) -> None:
    count = layout.indices.numel()
    if count >= 2**31:
        raise ValueError(f"the native kernels take up to {2**31 - 1} active units a layer, not {count}")
    indices = _validated_indices(layout)
    whole = index.row_ptr.numel() > 0
    status = library().sparsae_index(
        _pointer(indices),
        indices.dtype == torch.int64,
        count,
        layout.grid_rows,
        layout.shape[1] // layout.unit[1],
        _pointer(index.col_ptr),
        _pointer(index.row_ptr) if whole else None,
        _pointer(index.columns) if index.columns.numel() else None,
        index.columns.dtype == torch.int16,
        _pointer(index.source) if index.source.numel() else None,
    )
    if status:
        raise ValueError(_ERRORS[status])


def _problem(layout: Layout, col_ptr: Tensor, activations: Tensor) -> Problem:
    if activations.dtype not in DTYPES:
        raise ValueError(f"the native kernels take float32 or bfloat16 activations, not {activations.dtype}")
    indices = _validated_indices(layout)
    return Problem(
        tokens=activations.shape[0],
        out=layout.shape[0],
        in_=layout.shape[1],
        unit_out=layout.unit[0],
        unit_in=layout.unit[1],
        count=indices.numel(),
        indices=_pointer(indices),
        col_ptr=_pointer(col_ptr),
        indices_wide=indices.dtype == torch.int64,
        bfloat16=activations.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )


def _whole_problem(values: Tensor, layout: Layout, index: Index, bias: Tensor | None, activations: Tensor) -> Problem:
    _require("values", values, layout.values_shape, torch.float32)
    if bias is not None:
        _require("bias", bias, layout.shape[:1], torch.float32)
    _require_index(layout, index)
    problem = _problem(layout, index.col_ptr, activations)
    problem.row_ptr, problem.columns, problem.source = map(_pointer, index[1:])
    problem.columns_narrow = index.columns.dtype == torch.int16
    problem.values, problem.bias = _pointer(values), None if bias is None else _pointer(bias)
    return problem


def _column_dtype(layout: Layout) -> torch.dtype:
    return torch.int16 if layout.shape[1] // layout.unit[1] <= 2**16 else torch.int32


def _validated_indices(layout: Layout) -> Tensor:
    indices = layout.indices
    _require("indices", indices, (indices.numel(),), indices.dtype)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"unit indices must be int32 or int64, not {indices.dtype}")
    return indices


def _require_index(layout: Layout, index: Index) -> None:
    kept = (_in_row_order(layout),)
    _require("column starts", index.col_ptr, (layout.shape[1] // layout.unit[1] + 1,), torch.int32)
    _require("row starts", index.row_ptr, (layout.grid_rows + 1,), torch.int32)
    _require("columns", index.columns, kept, _column_dtype(layout))
    _require("sources", index.source, kept, torch.int32)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError for a tensor that the library would misread."""
    if tensor.shape == shape and (dtype is None or tensor.dtype is dtype) and tensor.is_cpu and tensor.is_contiguous():
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, not {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} have dtype {tensor.dtype}, not {dtype}")
    raise ValueError(f"{name} must be contiguous on the CPU")


def _call(function: str, problem: Problem | Mlp) -> None:
    if getattr(library(), function)(ctypes.byref(problem)):
        raise _no_memory()


def _no_memory() -> MemoryError:
    return MemoryError("no memory left for the native kernels' workspace")


def _row_order(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(row starts, columns, values) of single weights in row order, rows filled up to whole steps with zero weights."""
    step = 8  # ROW_STEP of csrc/problem.hpp
    columns, rows = layout.indices // layout.grid_rows, layout.indices % layout.grid_rows
    order = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows, minlength=layout.grid_rows)
    starts = functional.pad(torch.cumsum((counts + step - 1) // step * step, 0), (1, 0))
    shift = starts[:-1] - (torch.cumsum(counts, 0) - counts)
    at = torch.arange(len(order), dtype=torch.int64, device="cpu") + shift[rows[order]]
    # With a column of the row itself: zero times what another column holds might not be zero.
    columns = columns[order].to(torch.int16)
    last = (torch.cumsum(counts, 0) - 1).clamp(min=0)
    row_columns = columns[last].repeat_interleave(starts.diff()) if len(order) else columns
    row_columns[at] = columns
    row_values = _empty(int(starts[-1])).zero_()
    row_values[at] = values[order]
    return starts.to(torch.int32), row_columns, row_values


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the library writes into: never of the dtype or on the device that happens to be torch's default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()
