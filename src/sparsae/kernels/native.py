"""The compiled kernels, as Python sees them.

A torch-free shared library beside this file, called through ctypes. Everything that it is given is checked here, at
the boundary: devices, dtypes, shapes, contiguity, and every index when the index structures are made. It is loaded
after torch, so that both share one OpenMP runtime.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsae.kernels.backend import Layout

LIBRARY = Path(__file__).parent / "_native.so"
DTYPES = (torch.float32, torch.bfloat16)

_ERRORS = {
    1: "unit indices must lie inside the grid of the weight",
    2: "unit indices must be unique and in ascending order",
}


class _Problem(ctypes.Structure):
    """`Problem` of csrc/problem.hpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "out", "in_", "unit_out", "unit_in", "count")),
        *((name, ctypes.c_void_p) for name in ("indices", "col_ptr", "row_ptr", "columns", "source")),
        *((name, ctypes.c_void_p) for name in ("values", "bias", "x", "dy", "y", "dx", "dvalues")),
        *((name, ctypes.c_int32) for name in ("indices_wide", "columns_narrow", "bfloat16", "threads")),
    )


class Index(NamedTuple):
    """The structures beside a topology's indices: where grid columns and rows start, and the units in row order.

    col_ptr: (grid columns + 1,) int32. row_ptr: (grid rows + 1,) int32. columns: (count,) the grid column of each unit
    in row order, 16 bits wide (as int16) where they fit, else int32. source: of blocks, (count,) int32, its position in
    `indices`; of single weights (0,).
    """

    col_ptr: Tensor
    row_ptr: Tensor
    columns: Tensor
    source: Tensor


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "the native kernels were not compiled (install sparsae where a C++ compiler is found)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native kernels do not load: {error}"
    library.sparsae_isa.restype = ctypes.c_char_p
    library.sparsae_problem_size.restype = ctypes.c_int64
    library.sparsae_index.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    ]
    if library.sparsae_problem_size() != ctypes.sizeof(_Problem):
        return "the native kernels were compiled from other sources than this Python code (install sparsae again)"
    return library


def absence() -> str | None:
    """Why there are no native kernels; None where there are."""
    library = _load()
    return library if isinstance(library, str) else None


def isa() -> str:
    """The instruction set that runs: avx512, avx2 or portable. `SPARSAE_ISA` forces one before the first call."""
    return str(_library().sparsae_isa().decode())


def select_isa(name: str) -> bool:
    """Run another instruction set from now on; False where this machine lacks it, and nothing changes."""
    return bool(_library().sparsae_select_isa(name.encode()) == 0)


def make_index(layout: Layout) -> Index:
    """All structures of a layout, in O(count). Raises ValueError for indices out of range or order."""
    rows, columns = layout.grid_rows, layout.shape[1] // layout.unit[1]
    count = layout.indices.numel()
    index = Index(
        torch.empty(columns + 1, dtype=torch.int32),
        torch.empty(rows + 1, dtype=torch.int32),
        torch.empty(count, dtype=_column_dtype(layout)),
        torch.empty(_sources(layout), dtype=torch.int32),
    )
    _index(layout, index)
    return index


def point_columns(layout: Layout) -> Tensor:
    """Only where each grid column starts. Raises ValueError for indices out of range or order."""
    col_ptr = torch.empty(layout.shape[1] // layout.unit[1] + 1, dtype=torch.int32)
    _index(layout, Index(col_ptr, *(torch.empty(0),) * 3))
    return col_ptr


def forward(values: Tensor, layout: Layout, index: Index, x_TI: Tensor, bias: Tensor | None) -> Tensor:
    """Y = X W^T + b. values and bias: float32; x_TI and the result: float32 or bfloat16."""
    out_features, in_features = layout.shape
    x_TI = x_TI.contiguous()
    _check("values", values, layout.values_shape, torch.float32)
    _check("x", x_TI, (x_TI.shape[0], in_features))
    if bias is not None:
        _check("bias", bias, (out_features,), torch.float32)
    _check_index(layout, index)
    y_TO = x_TI.new_empty(x_TI.shape[0], out_features)
    problem = _problem(layout, index.col_ptr, x_TI)
    problem.row_ptr, problem.columns, problem.source = map(_pointer, index[1:])
    problem.columns_narrow = index.columns.dtype == torch.int16
    problem.values, problem.x, problem.y = _pointer(values), _pointer(x_TI), _pointer(y_TO)
    problem.bias = None if bias is None else _pointer(bias)
    _call("sparsae_forward", problem)
    return y_TO


def backward(
    layout: Layout, col_ptr: Tensor, dy_TO: Tensor, values: Tensor | None = None, x_TI: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(dX where values are given, gradient of the values where x_TI is given).

    values: float32. dy_TO and x_TI: float32 or bfloat16, the same. dX comes in their dtype, the gradient in float32.
    """
    out_features, in_features = layout.shape
    dy_TO = dy_TO.contiguous()
    tokens = dy_TO.shape[0]
    _check("dy", dy_TO, (tokens, out_features))
    _check("column starts", col_ptr, (in_features // layout.unit[1] + 1,), torch.int32)
    problem = _problem(layout, col_ptr, dy_TO)
    problem.dy = _pointer(dy_TO)
    dx_TI = dvalues = None
    if values is not None:
        _check("values", values, layout.values_shape, torch.float32)
        dx_TI = dy_TO.new_empty(tokens, in_features)
        problem.values, problem.dx = _pointer(values), _pointer(dx_TI)
    if x_TI is not None:
        x_TI = x_TI.contiguous()
        _check("x", x_TI, (tokens, in_features), dy_TO.dtype)
        dvalues = torch.empty(layout.values_shape)
        problem.x, problem.dvalues = _pointer(x_TI), _pointer(dvalues)
    _call("sparsae_backward", problem)
    return dx_TI, dvalues


def _sources(layout: Layout) -> int:
    return 0 if layout.unit == (1, 1) else layout.indices.numel()


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def _index(layout: Layout, index: Index) -> None:
    count = layout.indices.numel()
    if count >= 2**31:
        raise ValueError(f"the native kernels take up to {2**31 - 1} active units a layer, not {count}")
    indices = _checked_indices(layout)
    whole = index.row_ptr.numel() > 0
    status = _library().sparsae_index(
        _pointer(indices),
        indices.dtype == torch.int64,
        count,
        layout.grid_rows,
        layout.shape[1] // layout.unit[1],
        _pointer(index.col_ptr),
        _pointer(index.row_ptr) if whole else None,
        _pointer(index.columns) if whole else None,
        index.columns.dtype == torch.int16,
        _pointer(index.source) if index.source.numel() else None,
    )
    if status:
        raise ValueError(_ERRORS[status])


def _problem(layout: Layout, col_ptr: Tensor, activations: Tensor) -> _Problem:
    if activations.dtype not in DTYPES:
        raise ValueError(f"the native kernels take float32 or bfloat16 activations, not {activations.dtype}")
    indices = _checked_indices(layout)
    return _Problem(
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


def _column_dtype(layout: Layout) -> torch.dtype:
    return torch.int16 if layout.shape[1] // layout.unit[1] <= 2**16 else torch.int32


def _checked_indices(layout: Layout) -> Tensor:
    indices = layout.indices
    _check("indices", indices, (indices.numel(),), indices.dtype)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"unit indices must be int32 or int64, not {indices.dtype}")
    return indices


def _check_index(layout: Layout, index: Index) -> None:
    count = layout.indices.numel()
    _check("column starts", index.col_ptr, (layout.shape[1] // layout.unit[1] + 1,), torch.int32)
    _check("row starts", index.row_ptr, (layout.grid_rows + 1,), torch.int32)
    _check("columns", index.columns, (count,), _column_dtype(layout))
    _check("sources", index.source, (_sources(layout),), torch.int32)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError for a tensor that the library would misread."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, not {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} have dtype {tensor.dtype}, not {dtype}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous on the CPU")


def _call(function: str, problem: _Problem) -> None:
    if getattr(_library(), function)(ctypes.byref(problem)):
        raise MemoryError("no memory left for the native kernels' workspace")


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()
