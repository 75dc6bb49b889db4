"""Indices from outside: what is wrong with them as those of a sparse layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsae.config.unit import Quota, unit_name
from sparsae.core.groups import Groups
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.structures import same_indices


def quota_problem(topology: Topology, quota: Quota | None) -> str | None:
    """What is wrong with a topology that does not keep a quota; None: it does, or its indices are not there yet."""
    if quota is None or topology.indices.is_meta:
        return None
    if topology.unit != (1, 1) or topology.shape[1] % quota.of:
        return f"{quota} is of single weights, and of input features that {quota.of} divides"
    counts = Groups.of_quota(topology.grid, quota).counts(topology.indices)
    wrong = int((counts != quota.active).count_nonzero())
    return f"{wrong:,} of {counts.numel():,} groups of {quota.of} have not {quota.active} of them" if wrong else None


def validated(
    shape: tuple[int, int], indices: Tensor, unit: tuple[int, int], quota: Quota | None, what: str
) -> Topology:
    """The topology of indices from outside. Raises InputError for what no SparseLinear of this shape saves."""
    problem = None
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        problem = f"they are {indices.dtype} of shape {tuple(indices.shape)}, not sorted int32 or int64 unit numbers"
    else:
        try:
            topology = Topology.from_indices(shape, indices, unit)
        except ValueError as error:
            problem = str(error)
        else:
            problem = quota_problem(topology, quota)
            if problem is None and same_indices(indices, topology.indices):
                return topology
            problem = problem or "they are not sorted"
    raise InputError(
        f"{what} are not those of a {shape[0]}x{shape[1]} layer in units of {unit_name(unit, quota)}: {problem}; "
        "give what such a layer saved"
    )
