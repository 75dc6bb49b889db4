"""What FSDP2 (`fully_shard`) does to a model, as far as a search has to know it.

Between two passes each rank has a part of every parameter; for the time of a pass a module has its own whole, as other
tensors. A forward pass that no backward pass follows may leave it so, until somebody asks for the parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.core.ranks import ranks
from sparsae.core.shards import is_sharded, local
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """Those that `fully_shard` was called on."""
    # Where nobody has imported it, which takes long, there is none; nor without a process group.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and torch.distributed.is_initialized():
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def in_parts(model: nn.Module) -> None:
    """Let every module give up what a pass has gathered: the parameters are those of the optimizer again."""
    for module in sharded_modules(model):
        module.reshard()


def gradients_at(values: Sequence[Tensor], model: nn.Module) -> Callable[[Tensor], list[Tensor | None]]:
    """Before a forward pass: what gives the gradients of its loss, which all ranks have alike, at values in parts.

    Every parameter's `.grad` stays what it is.
    """
    # As long as they are the parts: during a pass the model has others.
    parameters = list(model.parameters())

    def gradients(loss: Tensor) -> list[Tensor | None]:
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            # Autograd knows the whole tensors only, whose gradients FSDP hands to the parts.
            loss.backward()
            return [own.grad for own in values]
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient

    return gradients


def refuse_unfit_wrapper(model: nn.Module) -> None:
    """Raise InputError for FSDP's first form, which hides its parameters from an optimizer besides."""
    if any(each.__name__ == "FullyShardedDataParallel" for module in model.modules() for each in type(module).__mro__):
        raise InputError(
            "the model is sharded by FullyShardedDataParallel, in which connections cannot move: use "
            "torch.distributed.fsdp.fully_shard"
        )


def refuse_unfit_shards(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Raise InputError where a layer's values are spread over ranks in a way that connections cannot move in."""
    found = {name: layer.values for name, layer in layers.items() if is_sharded(layer.values)}
    is_of_fsdp = any(True for _ in sharded_modules(model))
    for name, values in found.items():
        if not values.shape[0]:
            raise InputError(
                f"layer {name} has no connection, and fully_shard trains no empty parameter: leave it dense"
            )
        if why := _unfit(values) if is_of_fsdp else "by something else than fully_shard of the model or parts of it":
            raise InputError(
                f"the values of {name} are sharded over ranks {why}, and connections cannot move in them: call "
                "fully_shard over all ranks, without offloading, on the model that Sparsifier is given"
            )


def _unfit(values: Any) -> str | None:
    if any(placement.is_shard() and not placement.is_shard(0) for placement in values.placements):
        return "by another dimension than the first"
    if values.device_mesh.size() != max(1, ranks().count):
        return "that are not all of them"
    if local(values).device.type != values.device_mesh.device_type:
        return "and offloaded"
    return None
