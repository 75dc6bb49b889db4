"""Mini-burn-in: the gradient steps after a change, at another learning rate for the new connections.

It works with any optimizer, because it acts on what the optimizer did: each value ends where `before + m (after -
before)` puts it, with m the multiplier on new connections and, elsewhere, 1 (scope "all") or 0 (scope "new").
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsae.config.rules import BurnInConfig
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
        """After a change: `new` marks the grown units of the changed layers; an earlier burn-in ends."""
        self.new = {name: grown for name, grown in new.items() if bool(grown.any())} if self._config.steps else {}
        self.steps_left = self._config.steps if self.new else 0

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Between the backward pass and the optimizer's step."""
        if not self.active:
            return
        self._before = {name: self._layers[name].values.detach().clone() for name in self.new}
        if self._config.scope == "new":
            learning = {id(self._layers[name].values) for name in self.new}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in learning:
                        parameter.grad = None

    def after_step(self) -> None:
        """After the optimizer's step."""
        if not self.active:
            return
        elsewhere = 1.0 if self._config.scope == "all" else 0.0
        for name, before in self._before.items():
            values, new = self._layers[name].values.data, self.new[name]
            weight = torch.where(new, self._config.multiplier, elsewhere).to(values.dtype)
            values.copy_(torch.lerp(before, values, weight.view(-1, *[1] * (values.dim() - 1))))
        self._before = {}
        self.steps_left -= 1
        if not self.steps_left:
            self.new = {}
