"""What data parallelism has to know of sparse layers.

`DistributedDataParallel` reduces gradients in buckets that were cut for the parameters when it was made, by hooks on
autograd's nodes. Layers whose number of connections stays need nothing: the parameter is the same object, of the same
size. Another number wants new buckets and new hooks, for which the reducer is made again, as torch makes it for a copy
from a pickle.

The wrapper may be made before or after the Sparsifier, around the model or more, and is nobody's argument: it is looked
for among all objects, seldom.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsae.core.ranks import ranks
from sparsae.core.topology import digest
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear

Layers = Mapping[str, SparseLinear]


class DataParallel:
    """The wrappers that reduce gradients of some layers; none where a process trains alone."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._seen: list[ReferenceType[DistributedDataParallel]] | None = None

    def require_same(self, **more: bytes) -> None:
        """Raise RanksError where the topologies are not the same on all ranks, or one of `more` (as many bytes)."""
        if ranks().count > 1:
            found = {f"the connections of {name}": _digest(layer) for name, layer in self._layers.items()}
            ranks().require_same(found | more)

    def settle(self) -> None:
        """Before the first step: topologies, equal as they are, do not travel with every forward pass."""
        if ranks().count == 1 or self._seen is not None:
            return
        layers = {id(layer) for layer in self._layers.values()}
        for wrapper in self._wrappers():
            modules = wrapper.module.named_modules()
            wrapper.parameters_to_ignore |= {f"{name}.indices".lstrip(".") for name, m in modules if id(m) in layers}
            wrapper._assign_modules_buffers()

    def follow(self, names: set[str]) -> None:
        """The number of connections of these layers has changed."""
        if ranks().count == 1 or not names:
            return
        values = {id(self._layers[name].values) for name in names}
        for wrapper in self._wrappers():
            if values & set(map(id, wrapper.module.parameters())):
                _cut_anew(wrapper)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Passes through the wrappers inside are this rank's alone: they wait for no other."""
        wrappers: list[Any] = self._wrappers() if ranks().count > 1 else []
        before = [(w, w.require_backward_grad_sync, w.require_forward_param_sync) for w in wrappers]
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
        try:
            yield
        finally:
            for wrapper, backward, forward in before:
                wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = backward, forward

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


def refuse_sharded(model: nn.Module, layers: Layers) -> None:
    """Raise InputError where a layer's values are spread over ranks."""
    sharded = [name for name, layer in layers.items() if _is_a(layer.values, "DTensor")]
    if sharded or any(_is_a(module, "FullyShardedDataParallel") for module in model.modules()):
        what = f"the values of {sharded[0]} are" if sharded else "the model is"
        raise InputError(
            f"{what} sharded over ranks (FSDP, fully_shard, a device mesh), and connections cannot move in shards: "
            "wrap the model in DistributedDataParallel, whose ranks hold it whole"
        )


def _is_a(thing: object, kind: str) -> bool:
    # By name, for the import takes long.
    return any(each.__name__ == kind for each in type(thing).__mro__)


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
