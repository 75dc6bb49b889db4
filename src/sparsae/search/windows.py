"""Gradients of several steps before an update: which steps these are, and the sums over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsae.config.span import Horizon
from sparsae.core.cadence import Window
from sparsae.core.schedule import CONSTANT, Schedule
from sparsae.core.shards import local
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout
from sparsae.kernels.probe import Probe, largest_of
from sparsae.nn.linear import SparseLinear
from sparsae.rules.parts.rule import Rule


class Upcoming:
    """The next update of each rule, as far ahead as a window reaches; no step is looked at twice.

    schedule: of the density, which moves connections beside the updates of `whole`, the rule of all layers.
    """

    def __init__(self, horizon: Horizon, schedule: Schedule = CONSTANT, whole: Rule[Any] | None = None) -> None:
        self._horizon, self._schedule, self._whole = horizon, schedule, whole
        self._found: dict[int, tuple[int, int]] = {}  # rule -> its next update, and until where that is known
        self._settled: dict[tuple[int, int], int] = {}

    def of(self, rule: Rule[Any], step: int, within: int) -> int | None:
        """The first of the `within` steps from `step` on that an update of `rule` follows; None: there is none."""
        found, known = self._found.get(id(rule), (0, 0))
        last = min(step + within - 1, self._horizon.steps)
        if found < step:
            ahead = range(max(step, known + 1), last + 1)
            found = next((later for later in ahead if rule.due(later, self._horizon)), 0)
            self._found[id(rule)] = found, max(known, found or last)
        return found if step <= found <= last else None

    def settled(self, due: int, within: int) -> int:
        """The first of the `within` steps up to `due` from which on density stays until then."""
        if (due, within) not in self._settled:
            back = range(due - 1, due - within, -1) if self._schedule.moves else ()
            moves = (step for step in back if self._schedule.due(step, self._horizon, self._updates(step)))
            self._settled = {(due, within): next(moves, due - within) + 1}
        return self._settled[due, within]

    def _updates(self, step: int) -> bool:
        return self._whole is not None and self._whole.due(step, self._horizon)


@dataclass(eq=False)
class Sum:
    """Gradients of one layer, summed for the update that follows step `due`.

    units: those that are looked at, of a sample (None until its first backward pass where that decides). total: (n,) or
    (n, b_out, b_in) there, or dense: (in, out); None while there is nothing. steps: how many steps are in it.
    positions: of how many units gradients were computed; tokens: over how many, since an update has told of it.
    """

    topology: Topology
    due: int
    units: Tensor | None = None
    total: Tensor | None = None
    steps: int = 0
    positions: int = 0
    tokens: int = 0

    def saw(self, probe: Probe) -> None:
        """What a step looked at, whether its gradients are finite or not."""
        self.units = probe.units
        self.positions, self.tokens = max(self.positions, probe.positions), self.tokens + probe.tokens

    def add(self, gradient: Tensor | None, like: Tensor) -> None:
        """One step's gradient, in the precision of values `like`, at least float32; None: it is zero."""
        self.steps += 1
        if gradient is not None:
            wide = gradient.to(torch.promote_types(like.dtype, torch.float32))
            self.total = wide if self.total is None else self.total.add_(wide)

    def mean(self) -> Tensor | None:
        """Over the steps."""
        return None if self.total is None else self.total / self.steps

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [tensor for tensor in (self.units, self.total) if tensor is not None]


class GradientWindows:
    """The sums of all layers whose window is open. peak: the most bytes they held, with the step that came in."""

    def __init__(self, layers: Mapping[str, SparseLinear], horizon: Horizon) -> None:
        self._layers, self._horizon = layers, horizon
        self.begin(None, CONSTANT)

    def begin(self, rule: Rule[Any] | None, schedule: Schedule) -> None:
        """With nothing, for the updates of a rule beside a density schedule."""
        self._rule, self._schedule = rule, schedule
        self.clear()

    def clear(self) -> None:
        """Forget everything that was seen."""
        self.sums: dict[str, Sum] = {}
        self.peak = 0
        self._upcoming = Upcoming(self._horizon, self._schedule, self._rule)

    def wanted(self, rule: Rule[Any], state: Any) -> bool:
        """Whether a rule averages gradients over more than the step before an update."""
        if self._lengths(rule, state, self._layers):
            return True
        self.sums = {}
        return False

    def follow(
        self, rule: Rule[Any], state: Any, trained: Iterable[str], moved: Iterable[str], steps: range
    ) -> dict[str, int]:
        """Before a step, the last of `steps`: the layers that it sums gradients of, and the step of their update.

        moved: the layers of an update that follows this step, and has waited since the first of `steps`. Sums that
        belong to no window which is open now are forgotten, and there is one of every layer that is answered.
        """
        step, moved, found = steps[-1], set(moved), {}
        kept: dict[str, Sum] = {}
        for name, (window, length) in self._lengths(rule, state, trained).items():
            due = step if name in moved else self._upcoming.of(rule.of(name), step, length)
            if due is None or step < self._upcoming.settled(due, length):
                continue
            before = self.sums.get(name)
            is_open = before is not None and before.topology is self._layers[name].topology
            if before is not None and is_open and (before.due == due or (name in moved and before.due in steps)):
                kept[name] = before
            if name in moved or window.holds(step, due):
                kept.setdefault(name, Sum(self._layers[name].topology, due))
                found[name] = due
        self.sums = kept
        return found

    def _lengths(self, rule: Rule[Any], state: Any, layers: Iterable[str]) -> dict[str, tuple[Window, int]]:
        """The windows of layers, and their steps, of those that look at gradients in more than one."""
        if not rule.needs & {"gradient_at", "dense_gradient"}:
            return {}
        windows = rule.windows(layers, state)
        lengths = {window: window.length(self._horizon) for window in set(windows.values())}
        return {name: (window, n) for name, window in windows.items() if (n := lengths[window]) > 1}

    def samples(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The units that are looked at, of layers where that is known already."""
        return {name: units for name in names if (units := self.sums[name].units) is not None}

    def saw(self, probes: Mapping[str, Probe]) -> None:
        """Count what a step looked at, and the memory that it took."""
        for name, probe in probes.items():
            self.sums[name].saw(probe)
        held = [tensor for each in self.sums.values() for tensor in each.tensors]
        held += [probe.gradient for probe in probes.values() if probe.gradient is not None]
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in held))

    def add(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Take in one step, all of whose gradients are finite."""
        for name, gradient in gradients.items():
            self.sums[name].add(gradient, self._layers[name].values)

    def leave_out(self) -> None:
        """A step is not finite: no sample is taken from it."""
        for found in self.sums.values():
            if not found.steps:
                found.units = None

    def spent(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Of how many units of layers gradients were computed, over how many tokens since this was asked."""
        found = {}
        for name in names:
            if name in self.sums and (tokens := self.sums[name].tokens):
                found[name] = self.sums[name].positions, tokens
                self.sums[name].tokens = 0
        return found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values and tensors, by layer whose connections are still those that were summed for."""
        return {
            name: {key: value for key, value in vars(found).items() if key != "topology"}
            for name, found in self.sums.items()
            if found.topology is self._layers[name].topology
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """From `state_dict`, of the layers as they are. Raises ValueError, KeyError or TypeError for anything else."""
        self.clear()
        for name, fields in state.items():
            if name not in self._layers:
                raise ValueError(f"gradients of {name} are of no layer")
            layer = self._layers[name]
            there: dict[str, Any] = {
                key: v.to(layer.values.device) if isinstance(v, Tensor) else v for key, v in fields.items()
            }
            found = Sum(layer.topology, **there)
            shapes = [(layer.in_features, layer.out_features)]
            if found.units is not None:
                shapes = [(found.units.numel(), *layer.values.shape[1:])]
                if bool(layer.topology.contains(found.units).any()):
                    raise ValueError(f"gradients of {name} are at connections that are active")
            if found.total is not None and tuple(found.total.shape) not in shapes:
                raise ValueError(f"gradients of {name} are not of the layer's shape")
            self.sums[name] = found


def averaged(found: Sum, layer: SparseLinear, count: int | None) -> dict[str, Tensor]:
    """The mean of a layer's sum as fields of its view; count: how many of a dense gradient's largest, else None."""
    values, mean = local(layer.values.detach()), found.mean()
    if count is None:
        units = layer.indices[:0] if found.units is None else found.units
        gradient = values.new_zeros(units.numel(), *values.shape[1:]) if mean is None else mean.to(values.dtype)
        return {"sample": units, "sample_gradient": gradient}
    if mean is None:
        units, gradient, active = layer.indices[:0], values.new_zeros(0), values.new_zeros(layer.topology.count)
    else:
        units, gradient, active = largest_of(mean, Layout(layer.topology.shape, layer.unit, layer.indices), count)
    return {
        "sample": units,
        "sample_gradient": gradient.to(values.dtype),
        "active_gradient": active.to(values.dtype),
    }
