"""What a rule sees: the model's sparse layers at the moment of an update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sparsae.config.span import Horizon
from sparsae.core.groups import Groups, binding
from sparsae.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsae.core.heads import HeadLayout
    from sparsae.core.topology import Topology


@dataclass(frozen=True)
class PastValues:
    """A need: values of `steps` optimizer steps before an update, or of right after the last one if that is later."""

    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"PastValues wants a number of steps of at least 1, not {self.steps!r}")


# What has to be captured for an update, of the training step before it: gradients at active units ("gradient"), at
# sampled inactive ones ("gradient_at"), the largest of all ("dense_gradient"), the optimizer's averages ("moments"). Of
# each topology that is scored: its loss on held-out text ("loss"), and the gradient of that ("candidate_gradient").
Captured = Literal["gradient", "gradient_at", "dense_gradient", "moments", "loss", "candidate_gradient"]
Need = Captured | PastValues


@dataclass(frozen=True, eq=False)
class LayerView:
    """One sparse layer at the moment of an update.

    values, gradient (of the last backward pass) and moment (the optimizer's average gradient) have the topology's
    values_shape; sample holds inactive units and sample_gradient the gradients there. Under "dense_gradient" these are
    the units with the largest gradients, and sample_gradient (n,) and active_gradient (count,) are magnitudes, of the
    same backward passes. past: values from before, by the steps of each `PastValues`. bounds are (k_min, k_max) in
    units, groups those of attention heads and neurons that have limits, heads how the layer's features belong to
    attention heads, ends its units at the start and by its budget at the end of a run that prunes. What the rule did
    not declare is None, and so is active_gradient of a layer of which it wanted no unit.
    """

    topology: Topology
    values: Tensor
    bounds: tuple[int, int]
    groups: tuple[Groups, ...] = ()
    heads: HeadLayout | None = None
    gradient: Tensor | None = None
    moment: Tensor | None = None
    sample: Tensor | None = None
    sample_gradient: Tensor | None = None
    active_gradient: Tensor | None = None
    ends: tuple[int, int] | None = None
    past: Mapping[int, Tensor] = field(default_factory=dict)

    def having(self, **fields: Any) -> LayerView:
        """With these fields in the place of its own. Unlike `dataclasses.replace` it reads, and so gathers, nothing."""
        other = copy.copy(self)
        for name, value in fields.items():
            object.__setattr__(other, name, value)
        return other

    @property
    def magnitude(self) -> Tensor:
        """(count,) |w| of each unit, the L2 norm of a block."""
        return unit_magnitude(self.values)

    def holds(self, count: int) -> bool:
        """Whether so many active units are inside this layer's bounds."""
        return self.bounds[0] <= count <= self.bounds[1]

    def keeps_groups(self, drop: Tensor, grow: Tensor) -> bool:
        """Whether every group is inside its limits, or no farther outside, without and with these units."""
        for groups in binding(self.groups):
            before = groups.counts(self.topology.indices)
            after = before - groups.counts(drop) + groups.counts(grow)
            low, high = before.clamp(max=groups.least), before.clamp(min=groups.most)
            if not bool(((low <= after) & (after <= high)).all()):
                return False
        return True


class _Whole:
    """A tensor that is read whole: each reading gathers anew what is sharded over ranks, and keeps nothing.

    So a rule that looks at one layer after another has the numbers of one at a time.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, view: object | None, owner: type) -> Any:
        if view is None:
            return self
        from sparsae.core.shards import whole

        held = vars(view)[self._name]
        return None if held is None else whole(held)

    def __set__(self, view: object, held: Any) -> None:
        vars(view)[self._name] = held


for _name in ("values", "gradient", "moment"):
    setattr(LayerView, _name, _Whole(_name))


@dataclass(frozen=True, eq=False)
class Observation:
    """The model's sparse layers at an update, which follows step `step`, counted from 1, of `steps`.

    epoch: steps of a pass over the training data, None where that is not known. since: the step it was due at, where
    it had to wait for this one; 0: it did not.
    """

    layers: Mapping[str, LayerView]
    step: int
    steps: int
    epoch: int | None = None
    since: int = 0

    @property
    def made_up(self) -> range:
        """The steps whose updates this one is: its own, and those that it waited through."""
        return range(self.since or self.step, self.step + 1)

    @property
    def horizon(self) -> Horizon:
        """The length of the run."""
        return Horizon(self.steps, self.epoch)

    @property
    def progress(self) -> float:
        """Share of the run that has passed."""
        return self.step / self.steps

    @property
    def topologies(self) -> dict[str, Topology]:
        """The layers' topologies."""
        return {name: view.topology for name, view in self.layers.items()}

    @property
    def count(self) -> int:
        """Active units of the whole model."""
        return sum(view.topology.count for view in self.layers.values())


def unit_magnitude(tensor: Tensor) -> Tensor:
    """(count,) magnitude of each unit: |w|, or the L2 norm of a block."""
    return tensor.abs() if tensor.dim() == 1 else tensor.flatten(1).norm(dim=1)


def head_counts(topology: Topology, heads: HeadLayout) -> Tensor:
    """(heads,) active units of each attention head's slice of a layer."""
    import torch

    side = topology.rows if heads.axis == "out" else topology.columns
    block = topology.unit[0] if heads.axis == "out" else topology.unit[1]
    # Whoever counts by bincount waits for the device.
    counts = torch.zeros(heads.groups(*topology.shape), dtype=torch.int64, device=side.device)
    head = (side.long() * block) // heads.size
    return counts.index_add_(0, head, torch.ones_like(head))


def head_densities(topology: Topology, heads: HeadLayout) -> Tensor:
    """(heads,) density of each head's slice."""
    counts = head_counts(topology, heads)
    return counts.double() * counts.numel() / topology.units
