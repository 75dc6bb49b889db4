"""Tensors that lie in parts on the ranks, as FSDP2 (`fully_shard`) leaves a model's parameters: DTensors.

What is elementwise works on the rank's `local` part. What moves connections needs one layer's numbers `whole` for the
time that it takes, and has them `spread` again afterwards. Every other tensor is whole, and its own part: nobody has to
ask which it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsae.core.host import on_host
from sparsae.core.ranks import ranks

Key = TypeVar("Key")


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is one of several ranks together."""
    # Where nobody has imported it, which takes long, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of it: of a sharded tensor a new one, without gradient, for which all ranks have to come here."""
    return ranks().whole(tensor) if is_sharded(tensor) else tensor


class WholeEach(Mapping[Key, Tensor]):
    """Tensors each of which is read `whole`."""

    def __init__(self, tensors: Mapping[Key, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: Key) -> Tensor:
        return whole(self._tensors[key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it, in the same memory; of a sharded tensor without gradient."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        own: Tensor = sharded.to_local()
    return own


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that each rank has whole, lying as `like`, which has as many units; nothing is sent."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = like
    mesh = sharded.device_mesh
    with torch.no_grad():
        everywhere = DTensor.from_local(tensor.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        found: Tensor = everywhere.redistribute(placements=sharded.placements)
    return found


def to_save(tensor: Tensor) -> Tensor:
    """The tensor itself, without gradient; of a sharded one all of it, on the CPU."""
    return whole(tensor).cpu() if is_sharded(tensor) else tensor.detach()


def local_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that each rank has whole, what belongs to this rank's part of `like`."""
    return local(spread(tensor, like))


def lying_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Of any tensor what belongs to this rank's part of `like`; gathered first where it lies otherwise."""
    ours, theirs = (_placement(each) for each in (like, tensor))
    return local(tensor) if ours == theirs else local_of(whole(tensor), like)


def _placement(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def which_moved(parameters: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Which parameters are not what they were, in any rank's part; a device is waited for once.

    parameters: (own, was) each, was being what this rank's part was.
    """
    flags = on_host([(was != local(own.detach())).any() for own, was in parameters])
    return [ranks().any(bool(f)) if is_sharded(own) else bool(f) for (own, _), f in zip(parameters, flags, strict=True)]
