"""Gradients at connections that do not exist.

A probe asks the backward pass of a layer for more than the gradient of its values: dY^T X at a sample of inactive
units, or where it is largest of all. The request lives beside the operator, not in hooks, so compiled graphs answer it
too, and one layer at a time is worked on.

What a probe and a layer's passes know each other by is a number in a tensor, which goes through the operator with the
layer's index structures. Tensors that autograd saves may come back as copies (activation offload and checkpointing):
their values are the same then, their addresses are not.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparsae.core.ranking import smallest
from sparsae.core.ranks import ranks
from sparsae.core.shards import local
from sparsae.kernels.backend import Backend, Layout

_numbers = itertools.count()

# Open requests by their key's number, held weakly, so that none outlives whoever asked.
_open: WeakValueDictionary[int, Probe] = WeakValueDictionary()

# Units to look at, chosen in the backward pass from its (dY, X), (tokens, out) and (tokens, in).
Draw = Callable[[Tensor, Tensor], Tensor]


class Probe(ABC):
    """While open, watches the backward passes of one layer.

    units: (n,) flat numbers of inactive units, sorted; None before the first pass where that decides. gradient: None
    before the first pass, then what is known of the gradients there. positions: how many units' gradients were
    computed; tokens: over how many tokens.
    """

    units: Tensor | None = None
    gradient: Tensor | None = None
    positions = 0
    tokens = 0

    def __init__(
        self, key: Tensor, values: Tensor | None = None, has_gradient: Callable[[Tensor], bool] | None = None
    ) -> None:
        """key: that of the layer with the topology that it has now.

        values: the layer's. Where their own gradient starts anew, since a step was skipped, what is gathered does too.
        has_gradient: of values whose gradient may lie elsewhere than in `.grad`.
        """
        self._number, self._values = int(key), values
        self._has_gradient = has_gradient or (lambda own: own.grad is not None)
        # The backward pass that is under way.
        self._task: int | None = None
        # Forward passes that no backward pass has answered yet, and whether one has answered since the last.
        self._calls, self._answered = 0, False
        # The backward pass in which the last forward pass was computed again, -1 for none.
        self._again_in = -1
        _open[self._number] = self

    def close(self) -> None:
        """Stop; what was gathered stays."""
        if _open.get(self._number) is self:
            del _open[self._number]

    def called(self, task: int, trains: bool) -> None:
        """A forward pass of the layer, inside the backward pass `task` where activations are computed again, else -1.

        trains: whether a backward pass may follow.
        """
        self._again_in = task
        if task < 0 and trains:
            self._calls, self._answered = 1 if self._answered else self._calls + 1, False

    def _enter(self) -> tuple[bool, bool]:
        """In `add`: whether this is another backward pass than the last, and whether the first of a step."""
        # Reentrant checkpointing makes the backward pass of what it computes again one of its own, inside the other.
        task = torch._C._current_graph_task_id() if self._again_in < 0 else self._again_in
        is_other, self._task = task != self._task, task
        return is_other, is_other and self._values is not None and not self._has_gradient(self._values)

    @abstractmethod
    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Take in one backward pass of the layer that `layout` describes."""


class SampledGradients(Probe):
    """The gradients at given units, or at those that the first backward pass draws, summed over the passes.

    gradient: (n,) or (n, b_out, b_in) in the dtype of the products, of several passes in float32 or wider. `over_ranks`
    makes it that of all ranks.
    """

    def __init__(
        self,
        key: Tensor,
        units: Tensor | Draw,
        values: Tensor | None = None,
        has_gradient: Callable[[Tensor], bool] | None = None,
    ) -> None:
        super().__init__(key, values, has_gradient)
        self._draw = None if isinstance(units, Tensor) else units
        self.units = units if isinstance(units, Tensor) else None

    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        if self._enter()[1]:
            self.gradient, self.tokens = None, 0
            self.units = None if self._draw else self.units
        if self.units is None:
            assert self._draw is not None
            self.units = self._draw(dy_TO, x_TI)
        wanted = Layout(layout.shape, layout.unit, self.units.to(dy_TO.device))
        gradient = backend.sddmm(dy_TO, x_TI, wanted)
        self.positions = self.units.numel()
        self.tokens += x_TI.shape[0]
        if self.gradient is not None:
            # Half precision would round away what many small passes add.
            gradient = self.gradient.to(torch.promote_types(gradient.dtype, torch.float32)) + gradient
        self.gradient = gradient

    def or_zeros(self) -> Tensor:
        """The gradient in the dtype of the values, at least float32; zeros where no pass has come by."""
        assert self.units is not None
        assert self._values is not None
        wide = torch.promote_types(self._values.dtype, torch.float32)
        if self.gradient is None:
            return local(self._values).new_zeros(self.units.numel(), *self._values.shape[1:], dtype=wide)
        return self.gradient.to(wide)


class LargestGradients(Probe):
    """The `count` inactive units with the largest gradients of all, by magnitude (L2 norm of a block).

    gradient: (count,) their magnitudes; active: (nnz,) or (blocks,) those of the active units. Without a count it is
    the dense gradient, (in, out), and nothing is chosen. "last": the gradient of
    one backward pass, the last; `passes` is how many there will be, so that the earlier ones cost nothing (more than
    that many: the last one counts). "sum": of all passes. Of several ranks it is the mean. A layer that a pass comes
    through several times gets the sum of its calls. The layer's dense gradient is freed as soon as nothing can be added
    to it: after the last of as many calls as the forward pass made, or under "sum", and where that is not known, at
    `close`.
    """

    def __init__(
        self,
        key: Tensor,
        count: int | None,
        accumulate: Literal["last", "sum"],
        passes: int = 1,
        values: Tensor | None = None,
        has_gradient: Callable[[Tensor], bool] | None = None,
    ) -> None:
        super().__init__(key, values, has_gradient)
        self.active: Tensor | None = None
        self._count, self._accumulate, self._passes = count, accumulate, passes
        self._sum: Tensor | None = None
        self._layout: Layout | None = None
        # Backward passes so far.
        self._pass = 0

    def add(self, backend: Backend, layout: Layout, dy_TO: Tensor, x_TI: Tensor) -> None:
        is_other, is_first = self._enter()
        if is_first:
            self._pass, self.tokens = 0, 0
        if is_other:
            self._pass += 1
            if is_first or self._accumulate == "last":
                self._sum = None
        self._calls, self._answered = self._calls - 1, True
        if self._accumulate == "last" and self._pass < self._passes:
            return
        self.positions = layout.shape[0] * layout.shape[1] // (layout.unit[0] * layout.unit[1]) - layout.indices.numel()
        self.tokens += x_TI.shape[0]
        gradient_IO = x_TI.T @ dy_TO
        self._sum = gradient_IO if self._sum is None else self._sum.add_(gradient_IO)
        self._layout = layout
        if self._accumulate == "last" and self._calls == 0:
            self._finish()

    def close(self) -> None:
        super().close()
        self._finish()

    def _finish(self) -> None:
        if self._sum is not None and self._layout is not None:
            # Here, so that no rank holds the dense gradients of two layers.
            ranks().mean_(self._sum, "dense gradients")
            if self._count is None:
                self.gradient = self._sum
            else:
                self.units, self.gradient, self.active = largest_of(self._sum, self._layout, self._count)
            self._sum = None


def over_ranks(probes: Sequence[Probe]) -> None:
    """Of closed probes: let each have seen what those of all ranks saw, whose gradients are means over the ranks."""
    here = ranks()
    if here.count == 1 or not probes:
        return
    seen = here.sums([n for probe in probes for n in (probe.gradient is not None, probe.tokens)])
    for probe, tokens in zip(probes, seen[1::2], strict=True):
        probe.tokens = tokens
    sampled = [p for p, found in zip(probes, seen[::2], strict=True) if found and isinstance(p, SampledGradients)]
    if not sampled:
        return
    parts = [probe.or_zeros() for probe in sampled]
    total = here.mean_(torch.cat([part.flatten() for part in parts]), "sampled gradients")
    for probe, part, mean in zip(sampled, parts, total.split([part.numel() for part in parts]), strict=True):
        probe.gradient = mean.view(part.shape).to(part.dtype)


def largest_of(gradient_IO: Tensor, layout: Layout, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` inactive units with the largest magnitudes (all, where there are fewer), these, and the active ones'.

    Overwrites the dense gradient, an (in, out) matrix in the order of the units.
    """
    b_out, b_in = layout.unit
    if layout.unit == (1, 1):
        magnitude = gradient_IO.abs_().view(-1)
    else:
        blocks = gradient_IO.view(-1, b_in, layout.grid_rows, b_out)
        # At least in float32: half precision cannot hold the squares of what it can hold.
        wide = torch.promote_types(blocks.dtype, torch.float32)
        magnitude = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=wide).view(-1)
    active = magnitude.index_select(0, layout.indices)
    # What is no number counts as infinite, so that whoever asked sees it, and nothing is less than the active ones.
    magnitude.nan_to_num_(nan=math.inf, posinf=math.inf)
    magnitude.index_fill_(0, layout.indices.long(), -1.0)
    # In place, so that no second tensor of the dense weight's size exists.
    units = smallest(magnitude.neg_(), min(count, magnitude.numel() - layout.indices.numel()))
    return units.to(layout.indices.dtype), magnitude[units].neg_(), active


def new_key() -> Tensor:
    """A key that no other layer, and no other topology of a layer, has: a 0-dimensional int64 tensor on the CPU."""
    return torch.tensor(next(_numbers), dtype=torch.int64, device="cpu")


def open_probe(key: Tensor) -> Probe | None:
    """The open probe of the layer with this key."""
    return _open.get(int(key)) if _open else None


def probed(keys: Iterable[Tensor]) -> bool:
    """Whether there is an open probe of a layer with any of these keys."""
    return any(int(key) in _open for key in keys) if _open else False


def note_forward(key: Tensor, trains: bool) -> None:
    """Tell the open probe of the layer with this key, if there is one, of a forward pass: see `Probe.called`."""
    if _open and (probe := open_probe(key)) is not None:
        probe.called(torch._C._current_graph_task_id(), trains)
