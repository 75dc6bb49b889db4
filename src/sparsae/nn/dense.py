"""Between a dense weight and the units of a topology."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsae.core.groups import Groups, binding
from sparsae.core.ranking import largest, select
from sparsae.core.topology import Topology, grid_size, index_dtype
from sparsae.errors import InputError


def gathered(weight_OI: Tensor, topology: Topology) -> Tensor:
    """The numbers at the active units of a dense (out, in) tensor: of `topology.values_shape`."""
    (b_out, b_in), (rows, columns) = topology.unit, topology.grid
    blocks = weight_OI.reshape(rows, b_out, columns, b_in)
    row, column = topology.rows.long(), topology.columns.long()
    return blocks[row, :, column, :].reshape(topology.values_shape).contiguous()


def scattered(values: Tensor, topology: Topology) -> Tensor:
    """The inverse of `gathered`: (out, in), with zeros at inactive units."""
    rows, columns = topology.grid
    units = values.new_zeros(rows * columns, *topology.unit)
    units[topology.indices.long()] = values.view(-1, *topology.unit)
    return units.view(columns, rows, *topology.unit).permute(1, 2, 0, 3).reshape(topology.shape)


def strongest(weight_OI: Tensor, count: int, unit: tuple[int, int], groups: Sequence[Groups] = ()) -> Topology:
    """The `count` units of a dense weight with the largest |w| (L2 norm of a block), within the limits of groups.

    Of equal ones the first is taken. Raises InputError where more than one partition limits the choice.
    """
    (b_out, b_in), (rows, columns) = unit, (weight_OI.shape[0] // unit[0], weight_OI.shape[1] // unit[1])
    units = grid_size((weight_OI.shape[0], weight_OI.shape[1]), unit)
    magnitude = weight_OI.detach().abs()
    if unit != (1, 1):
        blocks = magnitude.reshape(rows, b_out, columns, b_in)
        wide = torch.promote_types(blocks.dtype, torch.float32)
        magnitude = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=wide)
    magnitude = magnitude.T.reshape(-1)
    limits = binding(groups)
    if len(limits) > 1:
        raise InputError("start 'magnitude' obeys one of head_min_density, fan_in and fan_out: leave out the others")
    if limits:
        (limit,) = limits
        labels = limit.of(torch.arange(units, device=magnitude.device))
        bounds = (
            torch.full((limit.count,), bound, dtype=torch.int64, device=magnitude.device)
            for bound in (limit.least, limit.most)
        )
        chosen = select(-magnitude, count, labels, *bounds)
    else:
        chosen = largest(magnitude, count)
    return Topology((weight_OI.shape[0], weight_OI.shape[1]), chosen.to(index_dtype(units)), unit)
