"""Values of the layers from before an update, for rules and terms that look at how far weights have moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsae.config.span import Horizon
from sparsae.core.observation import PastValues
from sparsae.core.shards import WholeEach, spread, to_save
from sparsae.core.topology import Topology
from sparsae.nn.linear import SparseLinear
from sparsae.rules.parts.rule import Rule


class PastCapture:
    """Keeps a copy of the values, once a window of steps before an update begins, until that update is over.

    So nothing is kept between an update and the beginning of the next window. A window that would begin before an
    update, under another topology, begins with it.
    """

    def __init__(self, layers: Mapping[str, SparseLinear], horizon: Horizon) -> None:
        self._layers, self._horizon = layers, horizon
        self._rule: Rule[Any] | None = None
        self._watched: set[int] = set()  # windows whose beginning is known not to lie before the present step
        self._taken: dict[int, dict[str, tuple[Topology, Tensor]]] = {}

    def follow(self, rule: Rule[Any], step: int, *, waiting: bool) -> None:
        """After `step` steps and the update that followed them, unless it is waiting for the next: begin windows."""
        if rule is not self._rule or (rule.due(step, self._horizon) and not waiting):
            self.clear()
            self._rule = rule
        for window in sorted(need.steps for need in rule.needs if isinstance(need, PastValues)):
            first, last = step + (window if window in self._watched else 1), min(step + window, self._horizon.steps)
            is_near = waiting or any(rule.due(later, self._horizon) for later in range(first, last + 1))
            if is_near or (window in self._taken and window in self._watched):
                self._renew(self._taken.setdefault(window, {}))
            else:
                self._taken.pop(window, None)  # taken for an update that will not happen: the run was extended
            self._watched.add(window)

    def of(self, layer: str) -> Mapping[int, Tensor]:
        """What a layer's values were when each window began."""
        return WholeEach({window: layers[layer][1] for window, layers in self._taken.items()})

    def clear(self) -> None:
        """Forget everything."""
        self._watched, self._taken = set(), {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by window and layer."""
        return {
            str(window): {name: to_save(values) for name, (_, values) in layers.items()}
            for window, layers in self._taken.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From `state_dict`, of the layers as they are."""
        for name, values in [pair for layers in state.values() for pair in layers.items()]:
            if name not in self._layers or values.shape != self._layers[name].values.shape:
                raise ValueError(f"past values of {name} are not of the layer's connections")
        self.clear()
        self._taken = {
            int(window): {
                name: (self._layers[name].topology, spread(values.to(own.device), own))
                for name, values in layers.items()
                for own in [self._layers[name].values]
            }
            for window, layers in state.items()
        }

    def _renew(self, taken: dict[str, tuple[Topology, Tensor]]) -> None:
        """Copy what there is no copy of, or one under another topology."""
        for name, layer in self._layers.items():
            if name not in taken or taken[name][0] is not layer.topology:
                taken[name] = (layer.topology, torch.clone(layer.values.detach()))
