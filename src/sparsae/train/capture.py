"""What an update sees of the gradients of one optimizer step: probes before its backward pass, views after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.span import Horizon
from sparsae.core.groups import Groups, binding
from sparsae.core.heads import HeadLayout
from sparsae.core.observation import LayerView, Need
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.kernels.probe import LargestGradients, Probe, SampledGradients
from sparsae.nn.linear import SparseLinear
from sparsae.rules.parts.rule import Rule
from sparsae.train.calls import refuse_lost, refuse_tied, trained_layers

log = logging.getLogger(__name__)


class GradientCapture:
    """Gathers just what a rule needs, just in the steps that an update follows.

    trained: the layers that take part in the coming update. views: what was seen of them, by layer, from `take` until
    `clear`; None else. norms: of their gradients. not_finite: the first layer with a gradient that is not finite.
    groups: of each layer, those that have limits.
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
        self.probes: dict[str, Probe] = {}
        self.norms: dict[str, float] = {}
        self.views: dict[str, LayerView] | None = None
        self.not_finite: str | None = None

    def arm(self, rule: Rule[Any], state: Any, steps: range, ends: Mapping[str, tuple[int, int]]) -> None:
        """Before the backward pass of a step (counted from 1), which an update follows: probe what the rule wants.

        steps: that step, the last, after those that the update has waited through since it was due.
        What trains now takes part in that update, and nothing else. Raises InputError for a layer that trains while
        the optimizer does not have it or that is no longer in the model, for two layers with the same values, and where
        layers were frozen or not while a rule prunes that counted otherwise.
        """
        step = steps[-1]
        self.trained = trained_layers(self._layers, self._optimizer)
        refuse_lost(self._model, self._layers)
        refuse_tied(self._layers)
        if ends and (other := sorted(set(self.trained) ^ set(ends))):
            raise InputError(
                f"layer {other[0]} was frozen or unfrozen since pruning began, which counts on the layers that trained "
                "then: keep requires_grad as it was until pruning is over"
            )
        if not self.trained:
            log.warning("every sparse layer is frozen: the update at step %d leaves the topology as it is", step)
            return
        moved = rule.concerns(self.trained, steps, self._horizon)
        topologies = {name: layer.topology for name, layer in self.trained.items() if name in moved}
        if "gradient_at" in rule.needs:
            samples = rule.sample(topologies, state, generator(self._seed, "sample", step))
            self.probes |= {
                name: SampledGradients(self._layers[name].key, units, self._layers[name].values)
                for name, units in samples.items()
            }
        if "dense_gradient" in rule.needs:
            for name, n in rule.growth(topologies, state, step / self._horizon.steps).items():
                if n:
                    # Where groups have limits, not all of the largest may be grown: others have to be there.
                    kept = max(n, topologies[name].count) if binding(self.groups.get(name, ())) else n
                    layer = self._layers[name]
                    self.probes[name] = LargestGradients(layer.key, kept, rule.accumulate, self._passes, layer.values)

    def take(
        self,
        rule: Rule[Any],
        bounds: Mapping[str, tuple[int, int]],
        ends: Mapping[str, tuple[int, int]],
        scale: Tensor | None = None,
    ) -> None:
        """Between the backward pass and the optimizer's step: keep what the rule needs of the gradients.

        scale: what a gradient scaler multiplied those of the values with, which it leaves to the optimizer to undo.
        Raises InputError where a probe that the rule needs was not answered.
        """
        self.close()
        needs, views = rule.needs, {}
        self.not_finite = None
        self.trained = {name: layer for name, layer in self.trained.items() if layer.values.requires_grad}
        for name, layer in self.trained.items():
            gradient = layer.values.grad
            if gradient is None:
                gradient = torch.zeros_like(layer.values)
            elif scale is not None:
                gradient = gradient / scale
            probe = self.probes.get(name)
            if probe is not None and probe.gradient is None and bool(gradient.any()):
                raise InputError(_unanswered(name, self._passes))
            self.norms[name] = float(gradient.norm())
            probed = self._probed(name, needs)
            if not (_is_finite(gradient, self.norms[name]) and _is_finite(probed.get("sample_gradient"))):
                self.not_finite = self.not_finite or name
            views[name] = LayerView(
                layer.topology,
                layer.values.data,
                bounds[name],
                self.groups.get(name, ()),
                self._heads.get(name),
                gradient=gradient.detach().clone() if "gradient" in needs else None,
                ends=ends.get(name),
                **probed,
            )
        # Where everything has been frozen since, there is nothing to update.
        self.views = views or None

    def probed(self) -> dict[str, tuple[int, int]]:
        """By layer: the inactive weights whose gradients were computed, and over how many tokens."""
        found = {}
        for name, probe in self.probes.items():
            b_out, b_in = self._layers[name].unit
            found[name] = (probe.positions * b_out * b_in, probe.tokens)
        return found

    def close(self) -> None:
        """Watch no backward pass any more; what was gathered stays."""
        for probe in self.probes.values():
            probe.close()

    def clear(self) -> None:
        """Forget the step."""
        self.close()
        self.views, self.norms, self.probes = None, {}, {}

    def _probed(self, name: str, needs: frozenset[Need]) -> dict[str, Any]:
        """What a layer's probe saw, as fields of its view: no unit at all where the rule wanted none of the layer."""
        probe, layer = self.probes.get(name), self._layers[name]
        values = layer.values.detach()
        if probe is None:
            wanted = needs & {"gradient_at", "dense_gradient"}
            return {"sample": layer.indices[:0], "sample_gradient": values[:0]} if wanted else {}
        units = layer.indices[:0] if probe.units is None else probe.units
        dense = isinstance(probe, LargestGradients)
        if probe.gradient is None:
            gradient = values.new_zeros(units.numel(), *(() if dense else values.shape[1:]))
        else:
            gradient = probe.gradient.to(values.dtype)
        fields = {"sample": units, "sample_gradient": gradient}
        if isinstance(probe, LargestGradients):
            active = values.new_zeros(layer.topology.count) if probe.active is None else probe.active.to(values.dtype)
            fields["active_gradient"] = active
        return fields


def _unanswered(name: str, passes: int) -> str:
    made = (
        "" if passes == 1 else f"fewer than the {passes} backward passes of SparsifierConfig.accumulation were made, "
    )
    return (
        f"layer {name} got a gradient of its values, but none at inactive connections, where the rule wants it: {made}"
        "its topology was replaced since the last step, or compiled code reads its `weight` instead of calling it"
    )


def _is_finite(tensor: Tensor | None, norm: float = math.nan) -> bool:
    """Whether all elements are finite: a finite norm tells; another may have overflowed by itself."""
    return tensor is None or math.isfinite(norm) or bool(tensor.isfinite().all())
