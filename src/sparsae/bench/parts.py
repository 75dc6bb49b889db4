"""What the time of a training step goes to, by torch's profiler: the same parts for every model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

OTHER = "other"
# What is recorded of each part, by the beginning of its name: the outermost event that matches counts whole, so the
# products inside of the loss are the head's. Layers are the linear ones, dense or sparse, with the activation where the
# MLP is fused.
_PARTS = {
    "head": ("_ChunkedLoss",),
    "attention": ("_CausalAttention", "aten::scaled_dot_product", "ScaledDotProduct"),
    "layers": (
        *("sparsae::", "GeneratedBackwardFor_sparsae"),
        *("aten::linear", "aten::addmm", "AddmmBackward", "MmBackward"),
    ),
    "optimizer": ("Optimizer.step",),
}
# The search is counted by the run's own stopwatch.
NAMES = ("attention", "layers", "head", "optimizer", "search", OTHER)
_BACKWARD = "autograd::engine::evaluate_function: "


def seconds_by_part(step: Callable[[], None], search: Callable[[], float]) -> dict[str, float]:
    """The wall time of one call of `step` by NAMES. search: the seconds that the search has taken so far."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says when it starts and stops
    # There is one cycle, whose events stay either way; torch 2.11 warns where it is not asked for them.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        searched, started = search(), time.perf_counter()
        step()
        whole, searched = time.perf_counter() - started, search() - searched
    found = dict.fromkeys(NAMES, 0.0)
    for part, seconds in _outermost(profile.events() or ()):
        found[part] += seconds
    found["search"] = searched
    found[OTHER] = max(0.0, whole - sum(found.values()))
    return found


def _outermost(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    for event in events:
        part, parent = _part_of(event.name), event.cpu_parent
        while part is not None and parent is not None:
            if _part_of(parent.name) is not None:
                part = None
            parent = parent.cpu_parent
        if part is not None:
            yield part, event.time_range.elapsed_us() / 1e6


def _part_of(name: str) -> str | None:
    name = name.removeprefix(_BACKWARD)
    return next((part for part, begins in _PARTS.items() if name.startswith(begins)), None)
