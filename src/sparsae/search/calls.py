"""Whether the loop around a `Sparsifier` lets it work: what was forgotten, or happens in the wrong order, is told.

What silently ends the search is an error. What may be meant (a step that a gradient scaler skips) is logged, once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.span import Horizon
from sparsae.core.shards import local
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear
from sparsae.optimizer_state import refuse_unmovable
from sparsae.rules.parts.rule import Rule

log = logging.getLogger(__name__)


class LoopCalls:
    """Follows `before_step` and `after_step` of one loop in which connections move, by a rule or a density schedule."""

    def __init__(
        self, rule: Rule[Any], layers: Mapping[str, SparseLinear], optimizer: torch.optim.Optimizer, moves: bool
    ) -> None:
        """moves: whether any connection does."""
        self._rule, self._layers, self._optimizer, self._is_moved = rule, layers, optimizer, moves
        self._wants_gradients = bool(rule.needs & {"gradient", "gradient_at", "dense_gradient"})
        self._between = False  # before_step() was called, and after_step() was not yet
        self._before: tuple[str, Tensor] | None = None
        self._told: set[str] = set()
        # State exists after the first step; but a first step may have been skipped, and state may be made later.
        self._checks_state = True

    def before_step(self, due: bool, is_hooked: bool = False) -> None:
        """due: whether an update follows the next optimizer step. is_hooked: whether its hooks make the calls."""
        if not self._is_moved:
            return
        if self._between and not is_hooked:
            self._tell(
                "twice",
                "before_step() was called twice without after_step() between them: connections move in after_step(), "
                "which belongs after every optimizer.step() (once for all backward passes that are accumulated)",
            )
        self._between = True
        trained = {n: layer.values for n, layer in self._layers.items() if layer.values.requires_grad}
        learning = {n: values for n, values in trained.items() if values.grad is not None}
        if trained and not learning:
            advice = (
                "no sparse layer has a gradient in before_step(): call it after loss.backward() and before "
                "optimizer.zero_grad()"
            )
            if due and self._wants_gradients:
                raise InputError(f"{advice}; rule '{self._rule.name}' looks at gradients")
            self._tell("gradient", advice)
        self._before = None
        self._checks_state = self._checks_state or due

    def watch(self, due: bool) -> None:
        """Once nobody else takes a gradient away before the step: remember values that it has to change."""
        if not self._is_moved:
            return
        learning = {n: layer.values for n, layer in self._layers.items() if layer.values.grad is not None}
        smallest_first = sorted(learning, key=lambda n: local(learning[n]).numel()) if due else []
        name = next((n for n in smallest_first if self._moves(learning[n])), None)
        if name is not None:
            self._before = name, local(learning[name].detach()).clone()

    def after_step(self, stepped: bool = True) -> None:
        """Raises InputError for an optimizer whose state cannot follow connections that move.

        stepped: False where it is known that the step was skipped.
        """
        if not self._is_moved:
            return
        if not self._between:
            raise InputError(
                "after_step() without before_step(): call before_step() after loss.backward(), before optimizer.step()"
            )
        self._between = False
        if self._checks_state:
            refuse_unmovable(self._optimizer, {name: layer.values for name, layer in self._layers.items()})
            self._checks_state = False
        if self._before is not None:
            name, before = self._before
            self._before = None
            if stepped and torch.equal(before, local(self._layers[name].values.detach())):
                self._tell(
                    "step",
                    f"the values of {name} are the same in after_step() as in before_step(), and have a gradient: "
                    "call optimizer.step() between the two, if it was not skipped on purpose",
                )

    def _moves(self, values: Tensor) -> bool:
        """Whether the next step changes values: their gradient is finite and not zero, and their rate is not zero."""
        groups = (group for group in self._optimizer.param_groups if any(p is values for p in group["params"]))
        at_rest = any(group.get("lr") is not None and float(group["lr"]) == 0 for group in groups)
        gradient = None if values.grad is None else local(values.grad)
        return gradient is not None and not at_rest and bool(gradient.isfinite().all()) and bool(gradient.any())

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s", what)


def tell_if_still(rule: Rule[Any], horizon: Horizon) -> None:
    """Log that a rule never moves a connection in a run, though it is one that does."""
    if rule.moves and not any(rule.updates(horizon)):
        log.warning(
            "rule '%s' moves no connection in %d steps: the topology stays as it is drawn (set topology.every lower)",
            rule.name,
            horizon.steps,
        )


def trained_layers(layers: Mapping[str, SparseLinear], optimizer: torch.optim.Optimizer) -> dict[str, SparseLinear]:
    """The layers that are not frozen. Raises InputError for one whose values the optimizer does not have."""
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: layer for name, layer in layers.items() if layer.values.requires_grad}
    for name, layer in trained.items():
        if id(layer.values) not in optimized:
            raise InputError(
                f"the optimizer does not have the values of {name}: build it after sparsify(model, ...), or freeze the "
                "layer by requires_grad_(False)"
            )
    return trained


def refuse_lost(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Raise InputError for a layer that is not in the model now: whatever was done to it would be lost."""
    present, ahead = set[int](), [model]
    while ahead:  # of `modules()` a tenth of the time, for this is asked at every step
        if id(module := ahead.pop()) not in present:
            present.add(id(module))
            ahead += [child for child in module._modules.values() if child is not None]
    if lost := [name for name, layer in layers.items() if id(layer) not in present]:
        raise InputError(
            f"layer {lost[0]} was replaced in the model since Sparsifier was made (densify, sparsify): make another "
            "Sparsifier, and close() this one"
        )


def refuse_tied(layers: Mapping[str, SparseLinear]) -> None:
    """Raise InputError for a layer with another's values, which would move with its own to other places."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.values), name)
        if other != name:
            raise InputError(
                f"layers {other} and {name} share their values, which cannot follow two topologies: use one module "
                "under both names, or rule 'static'"
            )
