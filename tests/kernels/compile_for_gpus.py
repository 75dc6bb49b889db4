"""Compiles every Triton kernel for GPUs that are not there: python -m tests.kernels.compile_for_gpus

Arguments: 80, 89 or 90 (A100, RTX 4090, H100), bf16, fp16 or fp32, and `all` for all configurations instead of the
first, which takes minutes for each GPU. TRITON_INTERPRET must not be set.
Prints one line of JSON a kernel, dtype, block, configuration and GPU: registers, spilled ones and shared memory.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsae.kernels.cuda import blocks, dense
from sparsae.kernels.cuda.thresholds import BLOCKS, TILE_COLUMNS, TILE_ROWS
from sparsae.kernels.fused import adamw, loss

# By compute capability: shared memory that a program may take at most, in bytes.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_TILES = {"ROWS": TILE_ROWS, "COLUMNS": TILE_COLUMNS, "TOKENS": dense._TOKENS, "SLOTS": dense._SLOTS}


def kernels(dtype: str) -> Iterator[tuple[Any, dict[str, Any], list[tuple[dict[str, int], int, int]]]]:
    """(kernel, constants, configurations): all that are started for inputs of a dtype."""
    precision = "ieee" if dtype == "fp32" else "tf32"
    for unit in ((1, 1), (4, 4)):
        block = {"B_OUT": unit[0], "B_IN": unit[1], "CHUNK": dense._CHUNK}
        for compared in (False, True):
            yield dense._scatter, {**block, "COMPARED": compared}, [({}, 4, 3)]
        yield dense._gather, block, [({}, 4, 3)]
    if dtype != "fp32":
        yield dense._by_tiles.kernel, {**_TILES, "PRECISION": precision}, list(dense._by_tiles.configurations)
    for ramps in (False, True) if dtype == "fp32" else ():
        yield adamw._adamw, {"RAMPS": ramps, "COLUMNS": adamw._COLUMNS, "CHUNK": adamw._CHUNK}, [({}, 4, 3)]
    for teaches, gradient in itertools.product((False, True), repeat=2):
        yield loss._rows, {"TEACHES": teaches, "GRADIENT": gradient, "BLOCK": loss._BLOCK}, [({}, 4, 3)]
    for side in BLOCKS:
        block = {"B_OUT": side, "B_IN": side, "PRECISION": precision}
        yield blocks._spmm.kernel, {**block, "HAS_BIAS": True}, list(blocks._spmm.configurations)
        yield blocks._spmm_t.kernel, block, list(blocks._spmm_t.configurations)
        yield blocks._sddmm.kernel, {**block, "TOKENS": blocks._TOKENS}, list(blocks._sddmm.configurations)


# Of pointers; every other argument is a number. Values are float32 where they are scattered, gradients always.
_INTEGERS = {"indices": "*i32", "seen": "*i32", "starts": "*i64", "by_row": "*i32", "row_ptr": "*i64"}
_OF_ADAMW = dict.fromkeys(("table", "owner", "first"), "*i64") | {"numbers": "*fp32"}
_OF_ADAMW |= dict.fromkeys(("rest1", "beta2", "rest2", "log1", "log2", "eps"), "fp32")
_OF_LOSS = {"targets": "*i64", "sums": "*fp32", "ce_weight": "fp32", "kl_weight": "fp32"}
_FLOATS = ("logits", "teacher", "x", "dy", "values", "weight", "gradient", "found", "bias", "y", "dx")


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int, gpu: int) -> Any:
    wide = {"found"} | ({"values"} if kernel is dense._scatter else set())
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in (known := {adamw._adamw: _OF_ADAMW, loss._rows: _OF_LOSS}.get(kernel, _INTEGERS)):
            signature[name] = known[name]
        elif name in _FLOATS:
            signature[name] = "*fp32" if name in wide else f"*{dtype}"
        else:
            signature[name] = "i32"
        if name not in constants and name not in ("case", "row_tiles", "grid_rows", "grid_columns"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=at, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps, "num_stages": stages})


def registers(binary: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes that it spills, by cuobjdump, which comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    words = dict(word.split(":")[:2] for word in text.split() if word.count(":") == 1 and word[-1].isdigit())
    return int(words["REG"]), int(words["STACK"])


def main(gpus: list[int], dtypes: list[str], every: bool) -> None:
    for gpu, dtype in itertools.product(gpus, dtypes):
        for kernel, constants, configurations in kernels(dtype):
            for extra, warps, stages in configurations if every else configurations[:1]:
                found = compiled(kernel, dtype, constants | extra, warps, stages, gpu)
                used, spilled = registers(found.asm["cubin"])
                row = {"kernel": kernel.__name__, "gpu": gpu, "dtype": dtype, **constants, **extra, "warps": warps}
                row |= {"stages": stages, "shared": found.metadata.shared, "registers": used, "stack": spilled}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        [gpu for gpu in SHARED if str(gpu) in given] or list(SHARED),
        [name for name in ("bf16", "fp16", "fp32") if name in given] or ["bf16", "fp32"],
        "all" in given,
    )
