"""What a topology has been through: how far it moved, what it ever visited, how old its connections are.

Kept on the CPU in O(nnz) and O(positions ever active); it is no part of the model's state, and is counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsae.core.heads import HeadLayout
from sparsae.core.host import on_host
from sparsae.core.observation import head_densities
from sparsae.core.topology import Topology, remap
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import SparseLinear
from sparsae.search.rows import AgeRow, LayerRow, TopologyRow
from sparsae.surgery import Change


class TopologyTelemetry:
    """Per layer: the initial units, all units ever active, and the step at which each active one was grown."""

    def __init__(self, layers: Mapping[str, SparseLinear], heads: Mapping[str, HeadLayout]) -> None:
        self._layers = layers
        self._heads = heads
        self._start = {name: layer.topology.to("cpu") for name, layer in layers.items()}
        self._ever = {name: Topology(t.shape, t.indices.clone(), t.unit) for name, t in self._start.items()}
        self._birth = {name: torch.zeros(t.count, dtype=torch.int32, device="cpu") for name, t in self._start.items()}
        # Whether each active unit is one of the initial ones; it follows from the others.
        self._original = {name: torch.ones(t.count, dtype=torch.bool, device="cpu") for name, t in self._start.items()}

    def row(self, step: int, changes: Mapping[str, Change], gradient_norms: Mapping[str, float]) -> TopologyRow:
        """The row of an update at `step`, after its changes were carried out; it says nothing yet of who chose them."""
        brought = [tensor for change in changes.values() for tensor in (change.source, change.after.indices)]
        lines = [_used_lines(layer.topology) for layer in self._layers.values()]
        heads = [head_densities(self._layers[name].topology, layout) for name, layout in self._heads.items()]
        here, swapped = iter(on_host([*brought, *lines, *heads])), {}
        for name in changes:
            source, indices = next(here), next(here)
            at = (source < 0).nonzero().squeeze(1)
            grown, ever, swapped[name] = indices[at], self._ever[name], at.numel()
            self._birth[name] = remap(self._birth[name], source).index_fill_(0, at, step)
            original = remap(self._original[name], source)
            self._original[name] = original.index_copy_(0, at, self._start[name].contains(grown))
            self._ever[name] = ever.replace(ever.indices[:0], grown[~ever.contains(grown)])[0]
        nnz = sum(layer.topology.nnz for layer in self._layers.values())
        used_lines = [next(here).tolist() for _ in lines]
        densities = {name: next(here).tolist() for name in self._heads}
        ages = step - torch.cat(list(self._birth.values())).double()
        return TopologyRow(
            step,
            accepted=False,
            chosen=None,
            candidates=(),
            current=None,
            nnz=nnz,
            swaps=sum(swapped.values()),
            hamming_start=self._share_not_in_start(),
            hamming_last=sum(swapped.values()) / sum(layer.topology.count for layer in self._layers.values()),
            itop_rate=sum(t.count for t in self._ever.values()) / sum(t.units for t in self._ever.values()),
            age=AgeRow(mean=float(ages.mean()), median=float(ages.median()), max=float(ages.max())),
            layers={
                name: _layer_row(
                    layer.topology, used, densities.get(name), swapped.get(name, 0), gradient_norms.get(name, math.nan)
                )
                for (name, layer), used in zip(self._layers.items(), used_lines, strict=True)
            },
            seconds=0.0,
        )

    def _share_not_in_start(self) -> float:
        total = sum(original.numel() for original in self._original.values())
        return (total - sum(int(original.count_nonzero()) for original in self._original.values())) / total

    def nbytes(self) -> int:
        """Bytes held."""
        held = (*self.state_dict().values(), self._original)
        return sum(tensor.nbytes for part in held for tensor in part.values())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by layer."""
        return {
            "start": {name: topology.indices for name, topology in self._start.items()},
            "ever": {name: topology.indices for name, topology in self._ever.items()},
            "birth": dict(self._birth),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From `state_dict`, of the layers as they are. Raises InputError for anything else."""
        require_state("TopologyTelemetry", state, ("start", "ever", "birth"))
        for name, layer in self._layers.items():
            if lacking := [part for part in ("start", "ever", "birth") if name not in state[part]]:
                raise InputError(f"the telemetry has no '{lacking[0]}' of {name}: give what state_dict() returned")
            if state["birth"][name].numel() != layer.topology.count:
                raise InputError(
                    f"the telemetry is of {state['birth'][name].numel()} connections of {name}, which has "
                    f"{layer.topology.count}: load the model's state of the same step first"
                )
        for name, layer in self._layers.items():
            shape, unit = layer.topology.shape, layer.unit
            self._start[name] = Topology(shape, state["start"][name].cpu(), unit)
            self._ever[name] = Topology(shape, state["ever"][name].cpu(), unit)
            self._birth[name] = state["birth"][name].cpu()
            self._original[name] = self._start[name].contains(layer.topology.indices.cpu())


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
