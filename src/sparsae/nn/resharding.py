"""New values for a layer's parameter that FSDP2 has in parts, which stays the same object for the optimizer.

As many values as before go into the memory that there is. Another number wants other parts, buffers and shapes, for
which FSDP's record of the parameter is made again, as `fully_shard` makes it.
"""

from __future__ import annotations

import gc
import inspect
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from sparsae.core.shards import is_sharded, local, local_of, whole
from sparsae.errors import InputError

# FSDP's records by the id of their parameter, which does not know of them.
_records: dict[int, ReferenceType[Any]] = {}


@torch.no_grad()
def overwrite(own: Tensor, values: Tensor) -> None:
    """Values into a sharded parameter between two passes; they are whole on each rank, or lie as it does.

    Raises InputError for another number of them where the parameter is not one of `fully_shard`.
    """
    if own.shape == values.shape:
        local(own).copy_(local_of(values, own))
    else:
        _resize(_record_of(own), whole(values))


def has_gradient(own: Tensor) -> bool:
    """Whether a layer's values have a gradient since the last step, or a share of one that waits to be reduced."""
    if own.grad is not None or not is_sharded(own):
        return own.grad is not None
    record = _record_of(own)
    gathered = getattr(record, "_unsharded_param", None)
    return record.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None)


def _record_of(own: Tensor) -> Any:
    found = _records.get(id(own), lambda: None)()
    if found is None or found.sharded_param is not own:
        _records.clear()
        # By name, for the import takes long.
        records = (thing for thing in gc.get_objects() if type(thing).__name__ == "FSDPParam")
        _records.update({id(each.sharded_param): ref(each) for each in records if "sharded_param" in vars(each)})
        found = _records.get(id(own), lambda: None)()
    if found is None:
        raise InputError("a layer whose values are sharded by something else than fully_shard keeps their number")
    return found


def _resize(record: Any, values: Tensor) -> None:
    own = record.sharded_param
    record.all_gather_outputs = []
    record.unsharded_accumulated_grad = None
    vars(record).pop("_unsharded_param", None)
    given = {"device": record.device, "shard_placement_fn": None, "mesh_info": record.mesh_info}
    given["param"] = nn.Parameter(values, requires_grad=own.requires_grad)
    wanted = inspect.signature(record._init_sharded_param).parameters
    record._init_sharded_param(**{name: given[name] for name in wanted})
    if record.post_forward_mesh_info:
        record._init_sharded_post_forward_param_metadata(given["param"])
    # Everybody knows the parameter by the object.
    _trade(own, record.sharded_param)
    record.sharded_param = own
    record._setattr_on_modules(own)


def _trade(own: Any, other: Any) -> None:
    """Swap what two sharded parameters hold.

    Unlike `torch.utils.swap_tensors` each keeps its attributes, and may have weak references and be part of a graph:
    whoever has either means the object.
    """
    for slot in ("_local_tensor", "_spec"):
        mine, theirs = getattr(own, slot), getattr(other, slot)
        setattr(own, slot, theirs)
        setattr(other, slot, mine)
    torch._C._swap_tensor_impl(own, other)
