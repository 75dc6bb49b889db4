"""Mini-burn-in: the gradient steps after a change, at another learning rate for the new connections.

It works with any optimizer, because it acts on what the optimizer did: each value ends where `before + m (after -
before)` puts it, with m the multiplier on new connections and, elsewhere, 1 (scope "all") or 0 (scope "new").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsae.config.rules import BurnInConfig
from sparsae.core.shards import local, local_of, which_moved
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import SparseLinear


class BurnIn:
    """Steps left, and which units of each layer are new: `new[name]` is (count,) bool."""

    def __init__(self, config: BurnInConfig, layers: Mapping[str, SparseLinear]) -> None:
        self._config = config
        self._layers = layers
        self._before: dict[str, Tensor] = {}
        self.steps_left = 0
        self.new: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether the next optimizer step is one of burn-in."""
        return self.steps_left > 0

    def begin(self, new: Mapping[str, Tensor]) -> None:
        """After a change: `new` marks the grown units of layers that have some; an earlier burn-in ends."""
        self.new = dict(new) if self._config.steps else {}
        self.steps_left = self._config.steps if self.new else 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and bool tensors by layer."""
        return {"steps_left": self.steps_left, "new": dict(self.new)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, of the layers as they are. Raises InputError for anything else."""
        require_state("BurnIn", state, ["steps_left"])
        all_new = state.get("new", {})
        for name, new in all_new.items():
            layer = self._layers.get(name)
            if layer is None or new.shape != (layer.topology.count,):
                raise InputError(f"the burn-in's new connections of {name} are not this model's: load its state first")
        self.steps_left = int(state["steps_left"])
        self.new = {name: new.to(self._layers[name].values.device) for name, new in all_new.items()}
        self._before = {}

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Between the backward pass and the optimizer's step."""
        if not self.active:
            return
        self._before = {name: local(self._layers[name].values.detach()).clone() for name in self.new}
        if self._config.scope == "new":
            learning = {id(self._layers[name].values) for name in self.new}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in learning:
                        parameter.grad = None

    def after_step(self, stepped: bool = True) -> None:
        """After the optimizer's step, or after one that was skipped: nothing has moved, and it is none of these."""
        before, self._before = self._before, {}
        if not (self.active and stepped):
            return
        if not any(which_moved([(self._layers[name].values, was) for name, was in before.items()])):
            return
        elsewhere = 1.0 if self._config.scope == "all" else 0.0
        for name, was in before.items():
            values = local(self._layers[name].values.data)
            new = local_of(self.new[name], self._layers[name].values)
            weight = torch.where(new, self._config.multiplier, elsewhere).to(values.dtype)
            values.copy_(torch.lerp(was, values, weight.view(-1, *[1] * (values.dim() - 1))))
        self.steps_left -= 1
        if not self.steps_left:
            self.new = {}
