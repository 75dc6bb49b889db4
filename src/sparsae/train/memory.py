"""Bytes that training really holds, and what becomes of those that it frees."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.search.teacher import Storage, Teacher

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def out_of_memory_is_told(what: str) -> Iterator[None]:
    """Memory that is refused inside becomes an InputError: `what` does not fit."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).split("\n")[0]
    except RuntimeError as error:  # torch has no exception of its own for the CPU's memory
        if "alloc" not in str(error):
            raise
        reason = str(error).split("\n")[0]
    else:
        return
    raise InputError(
        f"{what} does not fit into memory ({reason}): lower training.batch_size, model.width, model.layers or "
        "model.context"
    )


def state_bytes(
    layers: Mapping[str, SparseLinear],
    optimizer: torch.optim.Optimizer,
    teacher: Mapping[str, Storage] | None,
) -> dict[str, int]:
    """Bytes of the sparsified layers' live tensors by part, each storage once, biases left out."""
    seen: set[int] = set()
    parts = {
        "values": [layer.values.detach() for layer in layers.values()],
        "gradients": [layer.values.grad for layer in layers.values() if layer.values.grad is not None],
        "optimizer": [
            value
            for layer in layers.values()
            for value in optimizer.state.get(layer.values, {}).values()
            if isinstance(value, Tensor) and value.dim()  # counters of a whole layer are left out as well
        ],
        "indices": [tensor for layer in layers.values() for tensor in layer.index_tensors],
        "teacher": [tensor for kept in (teacher or {}).values() for tensor in kept.tensors()],
    }
    return {name: _nbytes(tensors, seen) for name, tensors in parts.items()}


def model_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, teacher: Teacher | None) -> dict[str, int]:
    """Bytes of a whole model's live tensors by part, each storage once: what is sparse of it, and what is not."""
    seen: set[int] = set()
    parameters = list(model.parameters())
    parts = {
        "parameters": [parameter.detach() for parameter in parameters],
        "indices": [tensor for layer in sparse_layers(model).values() for tensor in layer.index_tensors],
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "optimizer": [
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ],
        "teacher": list(_tensors_of(teacher)),
    }
    return {name: _nbytes(tensors, seen) for name, tensors in parts.items()}


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the memory that a training step on the CPU frees, for the next step to take.

    By default glibc returns large buffers to the system at once, and gets them back page by page, each zeroed at its
    first use, which beside sparse layers is a noticeable part of a training step. Other C libraries, and CUDA's
    allocator, are left alone.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` start from now, so that it does not report the preparation of the text (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists() and os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: resident memory, or allocated memory of a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _tensors_of(teacher: Teacher | None) -> Iterator[Tensor]:
    if teacher is None or not teacher.begun:
        return
    yield from (parameter.detach() for parameter in teacher.model.parameters())
    for kept in teacher.layers.values():
        yield from kept.tensors()


def _nbytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        # Of its own bytes: runs that train as one program have their gradients in one storage.
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.nbytes
    return total
