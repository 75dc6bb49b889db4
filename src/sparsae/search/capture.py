"""What an update sees of the gradients of one optimizer step: probes before its backward pass, views after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsae.config.span import Horizon
from sparsae.core.groups import Groups, binding
from sparsae.core.heads import HeadLayout
from sparsae.core.host import on_host
from sparsae.core.observation import LayerView, Need
from sparsae.core.randomness import generator
from sparsae.core.shards import local, whole
from sparsae.errors import InputError
from sparsae.kernels.probe import LargestGradients, Probe, SampledGradients, over_ranks
from sparsae.nn.linear import SparseLinear
from sparsae.nn.resharding import has_gradient
from sparsae.rules.parts.rule import Rule
from sparsae.search.calls import refuse_lost, refuse_tied, tell_added, trained_layers
from sparsae.search.windows import GradientWindows, averaged

if TYPE_CHECKING:
    from sparsae.kernels.probe import Draw

log = logging.getLogger(__name__)


class GradientCapture:
    """Gathers just what a rule needs, just in the steps that an update follows or whose gradients are averaged for it.

    trained: the layers that take part in the next update. views: what was seen of them, by layer, from `take` until
    `clear`; None else. windows: sums of gradients for later updates. norms: of their gradients. not_finite: the first
    layer with a gradient that is not finite. groups: of each layer, those that have limits.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SparseLinear],
        optimizer: torch.optim.Optimizer,
        heads: Mapping[str, HeadLayout],
        *,
        horizon: Horizon,
        passes: int,
        seed: int,
    ) -> None:
        """passes: backward passes an optimizer step."""
        self._model, self._layers, self._optimizer = model, layers, optimizer
        self._heads = heads
        self.groups: Mapping[str, tuple[Groups, ...]] = {}
        self._horizon, self._passes, self._seed = horizon, passes, seed
        self.trained: Mapping[str, SparseLinear] = {}
        self.windows = GradientWindows(layers, horizon)
        self.probes: dict[str, Probe] = {}
        self._due, self._moved = False, set[str]()  # whether an update follows the step, and its layers
        self._counts: dict[str, int] = {}  # of how many units it wants a dense gradient
        self.norms: dict[str, float] = {}
        self.views: dict[str, LayerView] | None = None
        self.not_finite: str | None = None
        self._added = set[str]()  # layers that are known not to be searched

    def arm(
        self, rule: Rule[Any], state: Any, steps: range, ends: Mapping[str, tuple[int, int]], *, asks: bool = True
    ) -> None:
        """Before the backward pass of a step (counted from 1), which an update follows: probe what the rule wants.

        steps: that step, the last, after those that the update has waited through since it was due. asks: whether the
        rule is asked then, which else wants nothing.
        What trains now takes part in that update, and nothing else. Raises InputError for a layer that trains while
        the optimizer does not have it or that is no longer in the model, for two layers with the same values, and where
        layers were frozen or not while a rule prunes, or a schedule moves density, that counted otherwise.
        """
        step = steps[-1]
        self.trained = trained_layers(self._layers, self._optimizer)
        refuse_lost(self._model, self._layers)
        tell_added(self._model, self._layers, self._added)
        refuse_tied(self._layers)
        if ends and (other := sorted(set(self.trained) ^ set(ends))):
            raise InputError(
                f"layer {other[0]} was frozen or unfrozen since pruning began, which counts on the layers that trained "
                "then: keep requires_grad as it was until pruning, or the density schedule, is over"
            )
        if not self.trained:
            log.warning("every sparse layer is frozen: the update at step %d leaves the topology as it is", step)
            return
        self._due = True
        if asks:
            self._moved = rule.concerns(self.trained, steps, self._horizon)
            self._probe(rule, state, steps)
        else:
            self.gather(rule, state, step)

    def gather(self, rule: Rule[Any], state: Any, step: int) -> None:
        """Before the backward pass of a step that the rule is not asked after: probe what is averaged for later."""
        if self.windows.wanted(rule, state):
            self.trained = trained_layers(self._layers, self._optimizer)
            self._probe(rule, state, range(step, step + 1))

    def take(
        self,
        rule: Rule[Any],
        bounds: Mapping[str, tuple[int, int]],
        ends: Mapping[str, tuple[int, int]],
        scale: Tensor | None = None,
        loss_scale: float | None = None,
    ) -> None:
        """Between the backward pass and the optimizer's step: keep what the rule needs of the gradients.

        scale: what a gradient scaler multiplied those of the values with, which it leaves to the optimizer to undo.
        loss_scale: what it multiplied the loss with, where it has undone that for the values. Raises InputError where a
        probe that the rule needs was not answered.
        """
        self.close()
        over_ranks(list(self.probes.values()))
        self.trained = {name: layer for name, layer in self.trained.items() if layer.values.requires_grad}
        gradients = {name: _gradient(layer, scale) for name, layer in self.trained.items()}
        factor = scale if loss_scale is None else loss_scale
        self._note(gradients)
        self._sum(factor)
        if not self._due:
            return
        views = {}
        for name, layer in self.trained.items():
            views[name] = LayerView(
                layer.topology,
                layer.values.detach(),
                bounds[name],
                self.groups.get(name, ()),
                self._heads.get(name),
                gradient=gradients[name].detach().clone() if "gradient" in rule.needs else None,
                ends=ends.get(name),
                **self._probed(name, rule.needs, factor),
            )
        # Where everything has been frozen since, there is nothing to update.
        self.views = views or None

    def probed(self) -> dict[str, tuple[int, int]]:
        """By layer of the update: the inactive weights whose gradients were computed, and over how many tokens.

        Those of steps before it, which are averaged, are told once.
        """
        found = {name: (probe.positions, probe.tokens) for name, probe in self.probes.items()}
        found |= self.windows.spent(self._moved)
        sizes = {name: math.prod(self._layers[name].unit) for name in found}
        return {name: (positions * sizes[name], tokens) for name, (positions, tokens) in found.items()}

    def close(self) -> None:
        """Watch no backward pass any more; what was gathered stays."""
        for probe in self.probes.values():
            probe.close()

    def clear(self) -> None:
        """Forget the step; sums for a later update stay."""
        self.close()
        self.views, self.norms, self.probes = None, {}, {}
        self._due, self._moved, self._counts = False, set(), {}

    def _probe(self, rule: Rule[Any], state: Any, steps: range) -> None:
        """Watch the layers of the update that follows the last of `steps`, and those whose window it is in."""
        step, layers = steps[-1], self._layers
        summed = self.windows.follow(rule, state, self.trained, self._moved, steps)
        wanted = dict.fromkeys(self._moved, step) | summed
        topologies = {name: layer.topology for name, layer in self.trained.items() if name in wanted}
        if not topologies:
            return
        if "gradient_at" in rule.needs:
            samples: dict[str, Tensor | Draw] = dict(self.windows.samples(summed))
            fresh = {name: topology for name, topology in topologies.items() if name not in samples}
            samples |= rule.sample(fresh, state, generator(self._seed, "sample", step))
            for name, units in samples.items():
                self.probes[name] = SampledGradients(layers[name].key, units, layers[name].values, has_gradient)
        if "dense_gradient" in rule.needs:
            for due in dict.fromkeys(wanted.values()):
                part = {name: topology for name, topology in topologies.items() if wanted[name] == due}
                for name, n in rule.growth(part, state, due / self._horizon.steps).items():
                    if n:
                        self._probe_all(name, n, rule, is_summed=name in summed)

    def _probe_all(self, name: str, n: int, rule: Rule[Any], *, is_summed: bool) -> None:
        """Watch the dense gradient of a layer that grows n units."""
        layer = self._layers[name]
        # Where groups have limits, not all of the largest may be grown: others have to be there.
        kept = max(n, layer.topology.count) if binding(self.groups.get(name, ())) else n
        self._counts[name] = kept
        count = None if is_summed else kept
        self.probes[name] = LargestGradients(
            layer.key, count, rule.accumulate, self._passes, layer.values, has_gradient
        )

    def _note(self, gradients: Mapping[str, Tensor]) -> None:
        """Note norms, and what is not finite. Raises InputError where a probe was not answered."""
        self.not_finite = None
        norms, finite = list[Tensor](), list[Tensor]()
        for name, gradient in gradients.items():
            probe, seen = self.probes.get(name), whole(gradient)  # one at a time: see `shards`
            if probe is not None and probe.gradient is None and bool(seen.any()):
                raise InputError(_unanswered(name, self._passes))
            norms.append(seen.norm())
            is_finite = seen.isfinite().all()  # the norm of what is finite may overflow
            if probe is not None and probe.gradient is not None:
                is_finite = is_finite & probe.gradient.isfinite().all()
            finite.append(is_finite)
        found = on_host([*norms, *finite])
        for name, norm, is_finite in zip(gradients, found, found[len(norms) :], strict=False):
            self.norms[name] = float(norm)
            if not bool(is_finite):
                self.not_finite = self.not_finite or name

    def _sum(self, factor: float | Tensor | None) -> None:
        """Take what is averaged out of the probes: into the sums, unless the step is not finite."""
        summed = {name: self.probes.pop(name) for name in self.windows.sums if name in self.probes}
        self.windows.saw(summed)
        if self.not_finite is None:
            trained = {name: probe for name, probe in summed.items() if name in self.trained}
            self.windows.add({name: _unscaled(probe.gradient, factor) for name, probe in trained.items()})
        else:
            self.windows.leave_out()

    def _probed(self, name: str, needs: frozenset[Need], factor: float | Tensor | None) -> dict[str, Any]:
        """What was seen of a layer at inactive units, as fields of its view: none where the rule wanted none of it."""
        probe, layer = self.probes.get(name), self._layers[name]
        if name in self._moved and name in self.windows.sums:
            return averaged(self.windows.sums[name], layer, self._counts.get(name))
        values = local(layer.values.detach())
        if probe is None:
            wanted = needs & {"gradient_at", "dense_gradient"}
            return {"sample": layer.indices[:0], "sample_gradient": values[:0]} if wanted else {}
        units = layer.indices[:0] if probe.units is None else probe.units
        dense = isinstance(probe, LargestGradients)
        seen = _unscaled(probe.gradient, factor)
        if seen is None:
            gradient = values.new_zeros(units.numel(), *(() if dense else values.shape[1:]))
        else:
            gradient = seen.to(values.dtype)
        fields = {"sample": units, "sample_gradient": gradient}
        if isinstance(probe, LargestGradients):
            active = _unscaled(probe.active, factor)
            fields["active_gradient"] = (
                values.new_zeros(layer.topology.count) if active is None else active.to(values.dtype)
            )
        return fields


def _gradient(layer: SparseLinear, scale: Tensor | None) -> Tensor:
    """Of a layer's values: zeros where there is none."""
    gradient = layer.values.grad
    if gradient is None:
        return torch.zeros_like(layer.values)
    return gradient if scale is None else gradient / scale


def _unscaled(gradient: Tensor | None, factor: float | Tensor | None) -> Tensor | None:
    # At least in float32, which holds what half precision needs a scale for.
    if gradient is None or factor is None:
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / factor


def _unanswered(name: str, passes: int) -> str:
    made = (
        "" if passes == 1 else f"fewer than the {passes} backward passes of SparsifierConfig.accumulation were made, "
    )
    return (
        f"layer {name} got a gradient of its values, but none at inactive connections, where the rule wants it: {made}"
        "its topology was replaced since the last step, or compiled code reads its `weight` instead of calling it"
    )
