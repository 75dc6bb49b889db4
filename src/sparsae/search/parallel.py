"""What data parallelism has to know of sparse layers.

`DistributedDataParallel` reduces gradients in buckets that were cut for the parameters when it was made, by hooks on
autograd's nodes. Layers whose number of connections stays need nothing: the parameter is the same object, of the same
size. Another number wants new buckets and new hooks, for which the reducer is made again, as torch makes it for a copy
from a pickle.

A model that FSDP2 shards has no such wrapper: see sharding.py.

The wrapper may be made before or after the Sparsifier, around the model or more, and is nobody's argument: it is looked
for among all objects, seldom.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsae.core.ranks import ranks
from sparsae.core.shards import is_sharded
from sparsae.core.topology import digest
from sparsae.nn.linear import SparseLinear
from sparsae.search.sharding import gradients_at, in_parts
from sparsae.search.teacher import Teacher

Layers = Mapping[str, SparseLinear]


class DataParallel:
    """The wrappers that reduce gradients of some layers; none where a process trains alone, or in parts."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._model, self._layers = model, layers
        self.teacher: Teacher | None = None
        self._seen: list[ReferenceType[DistributedDataParallel]] | None = None
        self._is_settled = False

    def require_same(self, **more: bytes) -> None:
        """Raise RanksError where the topologies are not the same on all ranks, or one of `more` (as many bytes)."""
        if ranks().count > 1:
            found = {f"the connections of {name}": _digest(layer) for name, layer in self._layers.items()}
            ranks().require_same(found | more)

    def settle(self) -> None:
        """Before the first step: topologies, equal as they are, do not travel with every forward pass."""
        if self._is_settled or not _may_be_wrapped():
            return
        self._is_settled = True
        layers = {id(layer) for layer in self._layers.values()}
        for wrapper in self._wrappers():
            modules = wrapper.module.named_modules()
            wrapper.parameters_to_ignore |= {f"{name}.indices".lstrip(".") for name, m in modules if id(m) in layers}
            wrapper._assign_modules_buffers()

    def follow(self, names: set[str]) -> None:
        """The number of connections of these layers has changed, or may have."""
        if not names or not _may_be_wrapped():
            return
        values = {id(self._layers[name].values) for name in names}
        for wrapper in self._wrappers():
            if values & set(map(id, wrapper.module.parameters())):
                _cut_anew(wrapper)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Passes through the wrappers inside are this rank's alone: they wait for no other."""
        wrappers: list[Any] = self._wrappers() if _may_be_wrapped() else []
        before = [(w, w.require_backward_grad_sync, w.require_forward_param_sync) for w in wrappers]
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
        try:
            yield
        finally:
            for wrapper, backward, forward in before:
                wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = backward, forward

    def in_parts(self) -> None:
        """After a pass: parameters that are sharded over ranks are the optimizer's again, the teacher's too."""
        in_parts(self._model)
        if self.teacher is not None and self.teacher.begun:
            in_parts(self.teacher.model)

    def share(self, race: Sequence[int | None]) -> Sequence[int | None]:
        """What this rank scores: all of it where each pass is of all ranks together."""
        here = ranks()
        return race if self._is_sharded else race[here.rank :: here.count]

    def gradients_at(self, values: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor | None]]:
        """Before a forward pass: what gives the gradients of its loss at these; `.grad` stays what it is."""
        if self._is_sharded:
            return gradients_at(values, self._model)
        return lambda loss: list(torch.autograd.grad(loss, values, allow_unused=True))

    @property
    def _is_sharded(self) -> bool:
        return any(is_sharded(layer.values) for layer in self._layers.values())

    def _wrappers(self) -> list[DistributedDataParallel]:
        """Those that were seen, and where one is there no more, or none was, all that are there now."""
        seen = [wrapper() for wrapper in self._seen or ()]
        if not seen or None in seen:
            found = self._found()
            self._seen = [ref(wrapper) for wrapper in found]
            return found
        return [wrapper for wrapper in seen if wrapper is not None]

    def _found(self) -> list[DistributedDataParallel]:
        values = {id(layer.values) for layer in self._layers.values()}
        wrappers = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
        # One that is being made, or was given up half made, has no reducer.
        return [w for w in wrappers if "reducer" in vars(w) and values & set(map(id, w.module.parameters()))]


def _may_be_wrapped() -> bool:
    """Where processes are a group, if only of one: its wrapper has a reducer too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _digest(layer: SparseLinear) -> bytes:
    return digest(layer.topology.indices, layer.indices)


def _cut_anew(wrapper: Any) -> None:
    """New buckets and hooks for the parameters as they are."""
    del wrapper.reducer, wrapper.logger  # the hooks of the old ones go with them
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    for hook, state in wrapper._comm_hooks:
        torch.distributed._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]
