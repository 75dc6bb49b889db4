"""The shared library of compiled kernels: found, loaded and asked whether it belongs to this Python code.

It is free of torch and called through ctypes, and is loaded after torch, so that both share one OpenMP runtime.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

# What the library must answer: see sparsae_interface in csrc/api.cpp.
INTERFACE = 5
LIBRARY = Path(__file__).parent / "_native.so"


class Problem(ctypes.Structure):
    """`Problem` of csrc/problem.hpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "out", "in_", "unit_out", "unit_in", "count")),
        *((name, ctypes.c_void_p) for name in ("indices", "col_ptr", "row_ptr", "columns", "source")),
        *((name, ctypes.c_void_p) for name in ("values", "row_values", "bias")),
        *((name, ctypes.c_void_p) for name in ("x", "dy", "y", "dx", "dvalues", "dbias")),
        *((name, ctypes.c_int32) for name in ("indices_wide", "columns_narrow", "bfloat16", "threads")),
    )


class Mlp(ctypes.Structure):
    """`Mlp` of csrc/problem.hpp."""

    _fields_ = (
        *((name, Problem) for name in ("up", "gate", "down")),
        *((name, ctypes.c_int32) for name in ("activation", "gated")),
        ("kept", ctypes.c_void_p),
        ("kept_bfloat16", ctypes.c_int32),
    )


class Heads(ctypes.Structure):
    """`Heads` of csrc/problem.hpp."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))


class Attention(ctypes.Structure):
    """`Attention` of csrc/problem.hpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "tokens", "size")),
        *((name, Heads) for name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv")),
        ("logsum", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class Losses(ctypes.Structure):
    """`Losses` of csrc/problem.hpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "vocabulary", "taught", "ignored")),
        *((name, ctypes.c_void_p) for name in ("logits", "teacher", "targets", "sums", "gradient")),
        *((name, ctypes.c_float) for name in ("ce_weight", "kl_weight")),
        ("threads", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    """`Norm` of csrc/problem.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "bias")),
        ("epsilon", ctypes.c_float),
        ("centered", ctypes.c_int32),
    )


class TokenBlock(ctypes.Structure):
    """`TokenBlock` of csrc/problem.hpp."""

    _fields_ = (
        *((name, Norm) for name in ("norm_1", "norm_2", "query_norm", "key_norm")),
        ("projections", Problem * 3),
        *((name, Problem) for name in ("output", "up", "gate", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("projection_count", "activation", "gated")),
    )


class Token(ctypes.Structure):
    """`Token` of csrc/problem.hpp."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("count", "width", "heads", "kv_heads", "head_size", "context", "position")
        ),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "normed", "added", "projected", "attended", "hidden", "gate", "scores")
        ),
    )


def library() -> ctypes.CDLL:
    """The library. Raises RuntimeError where there is none."""
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


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
    stale = "the native kernels were compiled from other sources than this Python code (install sparsae again)"
    if not hasattr(library, "sparsae_interface") or library.sparsae_interface() != INTERFACE:
        return stale
    for size, structures in (
        (library.sparsae_problem_size, (Problem,)),
        (library.sparsae_mlp_size, (Mlp,)),
        (library.sparsae_attention_size, (Attention,)),
        (library.sparsae_losses_size, (Losses,)),
        (library.sparsae_token_size, (Token, TokenBlock)),
    ):
        size.restype = ctypes.c_int64
        if size() != sum(map(ctypes.sizeof, structures)):
            return stale
    library.sparsae_multiply_add.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.sparsae_multiply_add.restype = ctypes.c_double
    library.sparsae_triad.argtypes = [*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_int]
    library.sparsae_triad.restype = None
    return library


def absence() -> str | None:
    """Why there are no native kernels; None where there are."""
    found = _load()
    return found if isinstance(found, str) else None


def isa() -> str:
    """The instruction set that runs: avx512, avx2, neon or portable. `SPARSAE_ISA` forces one before the first call."""
    return str(library().sparsae_isa().decode())


def select_isa(name: str) -> bool:
    """Run another instruction set from now on; False where this machine lacks it, and nothing changes."""
    return bool(library().sparsae_select_isa(name.encode()) == 0)
