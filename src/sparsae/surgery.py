"""The one place that changes which connections exist.

A `Swap` says which units are dropped and which are grown. `prepare_swap` works out what each layer looks like
afterwards; a prepared swap can be tried (`preview`) and carried out (`commit`). Values, optimizer state and followers
(a teacher) move together: what stays keeps everything, what is dropped is deleted, and what is grown starts from its
initialization with a state of zeros, its own step count included (copies of the weights in the state start as the
weight does: optimizer_state.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparsae.core.host import on_host
from sparsae.core.shards import spread, whole
from sparsae.core.swap import Swap
from sparsae.core.topology import Replacement, Topology, remap
from sparsae.nn.indices import quota_problem
from sparsae.nn.linear import SparseLinear
from sparsae.optimizer_state import follow

InitialStd = Callable[[str, Topology], float]


@dataclass(frozen=True, eq=False)
class Change:
    """One layer before and after; `source` is each new unit's old position, -1 for a grown one.

    grow: (n,) the grown units, sorted: nobody has to wait to know how many they are. values: the new ones, lying as
    the layer's do: of a layer that is sharded over ranks this rank keeps its part.
    """

    before: Topology
    after: Topology
    source: Tensor
    grow: Tensor
    values: Tensor

    @property
    def grown(self) -> Tensor:
        """(count,) bool over the new units."""
        return self.source < 0


class Follower(Protocol):
    """What follows a layer's connections beside the optimizer's state, such as what a teacher keeps of the layer."""

    def follow(self, change: Change) -> None:
        """Take over the layer's new topology."""


@dataclass(frozen=True, eq=False)
class PreparedSwap:
    """A swap worked out for the layers that it touches."""

    layers: Mapping[str, SparseLinear]
    changes: dict[str, Change] = field(default_factory=dict)

    @contextmanager
    def preview(self) -> Iterator[None]:
        """The model as it would be, with optimizer and followers untouched; everything is as before afterwards."""
        with ExitStack() as tried:
            for name, change in self.changes.items():
                tried.enter_context(self.layers[name].trying(change.after, change.values))
            yield

    def commit(self, optimizer: torch.optim.Optimizer | None, followers: Mapping[str, Follower] | None = None) -> None:
        """Carry the swap out: values, every optimizer state tensor with an entry a unit, and the follower of each
        layer.

        Raises InputError, with nothing changed, where the optimizer's state cannot follow.
        """
        moves = {name: (change.source, change.values) for name, change in self.changes.items()}
        values = {name: layer.values for name, layer in self.layers.items()}
        move_state = follow(optimizer, values, moves) if optimizer is not None else None
        for name, change in self.changes.items():
            self.layers[name].set_topology(change.after, change.values)
            if move_state is not None:
                move_state(name)
            if followers:
                followers[name].follow(change)


def prepare_swap(
    layers: Mapping[str, SparseLinear],
    swap: Swap,
    initialization: str,
    rng: torch.Generator,
    initial_std: InitialStd | None = None,
) -> PreparedSwap:
    """Work out a swap; grown values by `initialization` ("zero", "kaiming_uniform" or "normal") from `rng`.

    initial_std: standard deviation of a layer's values, given its name and its topology after the swap: for "normal".
    Raises ValueError where the model's number of units would change by anything but what the swap says, where a dropped
    unit is not active, where a grown one is, and where a layer would not keep its quota.
    """
    dropped, grown = swap.size, sum(units.numel() for units in swap.grow.values())
    if dropped - grown != swap.shrinks:
        raise ValueError(
            f"a swap drops {dropped} units and grows {grown}, but says that the model shrinks by {swap.shrinks}: "
            "its nnz would change"
        )
    changes = {}
    for name, (after, source, grow) in _replaced(layers, swap).items():
        layer = layers[name]
        before = layer.topology
        if problem := quota_problem(after, layer.quota):
            raise ValueError(f"layer {name}: {problem}")
        values = remap(whole(layer.values.data), source)
        is_new = source < 0
        if initialization == "kaiming_uniform":
            values[is_new] = kaiming_uniform(after, rng).to(values.device, values.dtype)[is_new.cpu()]
        elif initialization == "normal" and initial_std is not None:
            drawn = torch.randn(
                int(is_new.sum()), *values.shape[1:], generator=rng, dtype=torch.float32, device="cpu"
            ) * initial_std(name, after)
            values[is_new] = drawn.to(values.device, values.dtype)
        elif initialization != "zero":
            known = "zero, kaiming_uniform, or with initial_std normal"
            raise ValueError(f"unknown initialization '{initialization}': use {known}")
        changes[name] = Change(before, after, source, grow, spread(values, layer.values))
    return PreparedSwap(layers, changes)


def _replaced(layers: Mapping[str, SparseLinear], swap: Swap) -> dict[str, tuple[Topology, Tensor, Tensor]]:
    """What `Topology.replace` makes of each layer that a swap touches, and what that grows; it waits once."""
    asked: dict[str, Replacement] = {}
    name = ""
    try:
        for name in swap.count_changes():
            topology = layers[name].topology
            empty = topology.indices[:0]
            asked[name] = topology.replacement(swap.drop.get(name, empty), swap.grow.get(name, empty))
        for name, wrong in zip(asked, on_host([each.wrong for each in asked.values()]), strict=True):
            asked[name].check(wrong.tolist())
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"layer {name}: {error}") from error
    return {name: (*each.made(), each.grow) for name, each in asked.items()}


def kaiming_uniform(topology: Topology, rng: torch.Generator) -> Tensor:
    """U(-b, b), b = sqrt(6 / active fan-in of the output) (He et al., 2015), for every active unit."""
    b_in, rows = topology.unit[1], topology.rows.long().cpu()
    fan_in = torch.bincount(rows, minlength=topology.grid[0])[rows] * b_in
    bound = math.sqrt(6.0) / fan_in.to(torch.float32).sqrt()
    uniform = torch.rand(topology.values_shape, generator=rng, dtype=torch.float32, device="cpu") * 2 - 1
    return uniform * bound.view(-1, *[1] * (uniform.dim() - 1))
