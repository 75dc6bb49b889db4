"""What a topology has been through: how far it moved, what it ever visited, how old its connections are.

Kept where the topology is, so that an update waits for a device once however much there is: 5 bytes a unit that is
active and a quarter of one a position, or the bytes of lists where connections are very few. It is no part of the
model's state, and is counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsae.core.heads import HeadLayout
from sparsae.core.host import on_host
from sparsae.core.marks import UnitSet, restored, set_of
from sparsae.core.observation import head_densities
from sparsae.core.ranking import kth_smallest, positions
from sparsae.core.topology import Topology, remap
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import SparseLinear
from sparsae.search.rows import AgeRow, LayerRow, TopologyRow
from sparsae.surgery import Change


@dataclass(eq=False)
class _History:
    """A layer's: initial units and all ever active; of each active one the step of its growth, and if it is initial.

    visits: () int64, how many units were ever active.
    """

    start: UnitSet
    ever: UnitSet
    visits: Tensor
    birth: Tensor
    original: Tensor

    @classmethod
    def of(cls, topology: Topology) -> _History:
        """Of a topology that begins."""
        indices = topology.indices
        visits = torch.full((), topology.count, dtype=torch.int64, device=indices.device)
        birth = torch.zeros_like(indices, dtype=torch.int32)
        original = torch.ones_like(indices, dtype=torch.bool)
        return cls(set_of(topology), set_of(topology), visits, birth, original)

    def follow(self, change: Change, step: int) -> None:
        """After an update at `step`."""
        self._to(change.source.device, change.before.units)
        at = positions(change.source < 0, change.grow.numel())
        self.birth = remap(self.birth, change.source).index_fill_(0, at, step)
        self.original = remap(self.original, change.source)
        self.original.index_copy_(0, at, self.start.contains(change.grow))
        self.visits = self.visits + self.ever.add(change.grow)

    def _to(self, device: torch.device, units: int) -> None:
        """To where the layer is now."""
        if self.birth.device != device:
            self.start, self.ever = (restored(units, part.tensor.to(device)) for part in (self.start, self.ever))
            self.visits, self.birth = self.visits.to(device), self.birth.to(device)
            self.original = self.original.to(device)


class TopologyTelemetry:
    """Per layer: the initial units, all units ever active, and the step at which each active one was grown."""

    def __init__(self, layers: Mapping[str, SparseLinear], heads: Mapping[str, HeadLayout]) -> None:
        self._layers = layers
        self._heads = heads
        self._of = {name: _History.of(layer.topology) for name, layer in layers.items()}

    def row(self, step: int, changes: Mapping[str, Change], gradient_norms: Mapping[str, float]) -> TopologyRow:
        """The row of an update at `step`, after its changes were carried out; it says nothing yet of who chose them."""
        for name, change in changes.items():
            self._of[name].follow(change, step)
        lines = [_used_lines(layer.topology) for layer in self._layers.values()]
        heads = [head_densities(self._layers[name].topology, layout) for name, layout in self._heads.items()]
        visits = [history.visits for history in self._of.values()]
        original = [history.original.count_nonzero() for history in self._of.values()]
        here = iter(on_host([*lines, *heads, *visits, *original, self._births()]))
        used_lines = [next(here).tolist() for _ in lines]
        densities = {name: next(here).tolist() for name in self._heads}
        ever, first = (sum(int(next(here)) for _ in self._of) for _ in range(2))
        total, median, oldest = next(here).tolist()
        count = sum(layer.topology.count for layer in self._layers.values())
        swapped = {name: change.grow.numel() for name, change in changes.items()}
        return TopologyRow(
            step,
            accepted=False,
            chosen=None,
            candidates=(),
            current=None,
            nnz=sum(layer.topology.nnz for layer in self._layers.values()),
            swaps=sum(swapped.values()),
            hamming_start=(count - first) / count,
            hamming_last=sum(swapped.values()) / count,
            itop_rate=ever / sum(layer.topology.units for layer in self._layers.values()),
            age=AgeRow(mean=step - total / count, median=float(step - median), max=float(step - oldest)),
            layers={
                name: _layer_row(
                    layer.topology, used, densities.get(name), swapped.get(name, 0), gradient_norms.get(name, math.nan)
                )
                for (name, layer), used in zip(self._layers.items(), used_lines, strict=True)
            },
            seconds=0.0,
        )

    def _births(self) -> Tensor:
        """(3,) int64 over all active units: the sum of their births, the median one's, and the first."""
        all_births = [history.birth for history in self._of.values()]
        births = torch.cat([birth.to(all_births[0].device) for birth in all_births])
        # The lower one of two ages in the middle is the later birth.
        median = kth_smallest(births, births.numel() // 2 + 1)
        return torch.stack([births.sum(dtype=torch.int64), median.long(), births.amin().long()])

    def nbytes(self) -> int:
        """Bytes held."""
        kept = (
            tensor
            for history in self._of.values()
            for tensor in (history.start.tensor, history.ever.tensor, history.birth, history.original)
        )
        return sum(tensor.nbytes for tensor in kept)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by layer: those of the sets of initial units and of all ever active, and births."""
        return {
            "start": {name: history.start.tensor for name, history in self._of.items()},
            "ever": {name: history.ever.tensor.clone() for name, history in self._of.items()},
            "birth": {name: history.birth for name, history in self._of.items()},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From `state_dict`, of the layers as they are. Raises InputError for anything else."""
        require_state("TopologyTelemetry", state, ("start", "ever", "birth"))
        found = {name: self._loaded(name, layer.topology, state) for name, layer in self._layers.items()}
        self._of = found

    def _loaded(self, name: str, topology: Topology, state: Mapping[str, Mapping[str, Tensor]]) -> _History:
        if lacking := [part for part in ("start", "ever", "birth") if name not in state[part]]:
            raise InputError(f"the telemetry has no '{lacking[0]}' of {name}: give what state_dict() returned")
        if state["birth"][name].numel() != topology.count:
            raise InputError(
                f"the telemetry is of {state['birth'][name].numel()} connections of {name}, which has "
                f"{topology.count}: load the model's state of the same step first"
            )
        device = topology.indices.device
        try:
            # Copied, since these change in place.
            start, ever = (restored(topology.units, state[part][name].to(device).clone()) for part in ("start", "ever"))
        except ValueError as error:
            raise InputError(f"the telemetry of {name} is not this layer's: {error}") from None
        original, birth = start.contains(topology.indices), state["birth"][name].to(device)
        return _History(start, ever, ever.count(), birth, original)


def _layer_row(
    topology: Topology, used_lines: list[int], densities: list[float] | None, swaps: int, norm: float
) -> LayerRow:
    rows, columns = topology.grid
    return LayerRow(
        shape=topology.shape,
        nnz=topology.nnz,
        units=math.prod(topology.shape),
        density=topology.density,
        swaps=swaps,
        gradient_activity=norm,
        dead_outputs=topology.unit[0] * (rows - used_lines[0]),
        dead_inputs=topology.unit[1] * (columns - used_lines[1]),
        head_densities=None if densities is None else tuple(round(density, 6) for density in densities),
    )


def _used_lines(topology: Topology) -> Tensor:
    """(2,) int64: how many of the grid's rows, and of its columns, have an active unit; nothing is waited for."""
    device = topology.indices.device
    used = []
    for lines, of_each_unit in zip(topology.grid, (topology.rows, topology.columns), strict=True):
        marks = torch.zeros(lines, dtype=torch.bool, device=device)
        used.append(marks.index_fill_(0, of_each_unit.long(), True).count_nonzero())
    return torch.stack(used)
