"""Below which density the native kernels beat dense arithmetic over the same storage.

Far from the break-even the answer is known; near it, and wherever the dense side may have hardware of its own
(bfloat16) or the kernels lack AVX-512, both are measured once a process on the layer in question, forward and backward,
and the answer is kept for layers of that shape and about that density.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsae.kernels import native
from sparsae.kernels.backend import Backend, Layout

log = logging.getLogger(__name__)

# Densities of float32 layers between which it is measured, with AVX-512. Blocks break even later.
SURE_TO_PAY, SURE_NOT_TO = 0.2, 0.75
# Weights of the smallest layer that is measured: below, calls cost more than products.
SMALLEST_MEASURED = 128 * 128
TOKENS, ROUNDS = 256, 3

_measured: dict[tuple[object, ...], bool] = {}


def pays(sparse: Backend, dense: Backend, layout: Layout, dtype: torch.dtype) -> bool:
    """Whether `sparse` takes less time than `dense` for a training step of this layer."""
    weights = layout.shape[0] * layout.shape[1]
    density = layout.indices.numel() * layout.unit[0] * layout.unit[1] / max(weights, 1)
    if density >= SURE_NOT_TO or weights < SMALLEST_MEASURED:
        return density < SURE_NOT_TO
    if density <= SURE_TO_PAY and dtype == torch.float32 and native.isa() == "avx512":
        return True
    key = (layout.shape, layout.unit, dtype, round(density * 50), native.isa(), torch.get_num_threads())
    if key not in _measured:
        ratio = _dense_over_sparse(sparse, dense, layout, dtype)
        _measured[key] = ratio > 1
        log.info(
            "native kernels take 1/%.2f of the dense time at %dx%d, units of %dx%d, density %.2f, %s",
            *(ratio, *layout.shape, *layout.unit, density, dtype),
        )
    return _measured[key]


def _dense_over_sparse(sparse: Backend, dense: Backend, layout: Layout, dtype: torch.dtype) -> float:
    """Time of a forward and backward pass by `dense`, divided by that of `sparse`: the best of a few, in turn."""
    values = torch.full(layout.values_shape, 0.5, dtype=dtype)
    x_TI = torch.full((TOKENS, layout.shape[1]), 0.5, dtype=dtype)
    dy_TO = torch.full((TOKENS, layout.shape[0]), 0.5, dtype=dtype)
    derived = layout._replace(derived=list(native.make_index(layout)))
    steps = [partial(_step, backend, values, derived, x_TI, dy_TO) for backend in (sparse, dense)]
    best = [min(times) for times in zip(*([_seconds(step) for step in steps] for _ in range(ROUNDS)), strict=True)]
    return best[1] / best[0]


def _step(backend: Backend, values: Tensor, layout: Layout, x_TI: Tensor, dy_TO: Tensor) -> None:
    backend.spmm(values, layout, x_TI)
    backend.backward(values, layout, dy_TO, x_TI, True, True)


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
