"""The ramp of a young connection's learning rate, by `AdamW` itself or, with other optimizers, after their steps.

With a the age of a connection in steps, its own step included, it learns at min(1, a / ramp) of the rate. `AdamW`,
which counts steps per weight, does so inside its step. What another optimizer did is undone in part: each value ends
where `before + min(1, a / ramp) (after - before)` puts it, `before` being after a weight decay that is decoupled
(`decay.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sparsae.config.span import Horizon
from sparsae.core.shards import local, local_of, which_moved
from sparsae.core.topology import remap
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import SparseLinear
from sparsae.optim import AdamW, ramp_share
from sparsae.optimizer_state import parts_of
from sparsae.rules.parts.rule import Rule
from sparsae.search.decay import Decay, decay_of, refuse_ahead
from sparsae.surgery import Change

_GROWN = 2**30  # the age of what no ramp, however long, concerns


class Ramp:
    """A rule's ramp over `steps` steps (0: none), of the first connections too or of grown ones alone.

    ages: of the layers whose optimizer does not count, (count,) int32 of each unit.
    """

    def __init__(
        self,
        rule: Rule[Any],
        steps: int,
        layers: Mapping[str, SparseLinear],
        optimizer: torch.optim.Optimizer,
        *,
        made: int = 0,
        before: Ramp | None = None,
    ) -> None:
        """Of what `refuse_ramp` has let pass.

        steps: at first; the rule's state may change them. made: the steps that the training has made. before: the ramp
        whose place this one takes, and whose ages go on.
        """
        self.rule, first = rule, rule.ramp_first
        self.steps, self._first, self._layers, self._optimizer = steps, first, layers, optimizer
        self._before: dict[str, tuple[Tensor, Decay] | None] = {}
        _LIVE.add(self)
        for group in _counting(layers, optimizer):
            group["ramp"], group["ramp_first"] = steps, first
        others = _others(layers, optimizer) if steps else {}
        age = made if first else _GROWN
        known = {} if before is None else before.handed_over(first, made)
        self.ages: dict[str, Tensor] = {
            name: known[name] if name in known else _ages(layer, age) for name, layer in others.items()
        }
        # The least of each layer's ages, or less: kept here, since a device would have to be waited for in every step.
        youngest = {} if before is None else before._youngest
        self._youngest: dict[str, int] = {name: min(youngest.get(name, age), age) for name in self.ages}

    def handed_over(self, first: bool, made: int) -> dict[str, Tensor]:
        """The ages as a ramp of the first connections too (`first`), or of grown ones alone, counts them."""
        if first == self._first:
            return self.ages
        if first:
            return {name: ages.masked_fill(ages >= _GROWN, made) for name, ages in self.ages.items()}
        return {name: ages.masked_fill(ages == ages.max(), _GROWN) for name, ages in self.ages.items() if ages.numel()}

    def last(self, steps: int) -> None:
        """From now on over so many steps."""
        self.steps = steps
        for group in _counting(self._layers, self._optimizer):
            group["ramp"] = steps

    def close(self) -> None:
        """Nothing follows it any more; connections that ramp go on to do so."""
        _LIVE.discard(self)

    def before_step(self) -> None:
        """Between the backward pass and the optimizer's step."""
        self._before = {}
        for name, youngest in self._youngest.items():
            values = self._layers[name].values
            if values.grad is not None:
                self._before[name] = None
                if youngest + 1 < self.steps:
                    refuse_ahead(self._optimizer, values)
                    self._before[name] = local(values.detach()).clone(), decay_of(self._optimizer, values)

    def after_step(self, stepped: bool = True) -> None:
        """After the optimizer's step, or after one that was skipped: nothing has moved then, and nothing ages."""
        seen, self._before = self._before if stepped else {}, {}
        held = {name: (self._layers[name].values, each[0]) for name, each in seen.items() if each is not None}
        moved = dict(zip(held, which_moved(list(held.values())), strict=True))
        for name, each in seen.items():
            if not moved.get(name, True):
                continue
            self.ages[name] += 1
            self._youngest[name] += 1
            if each is None:
                continue
            before, decay = each
            own = self._layers[name].values
            values = local(own.data)
            share = ramp_share(local_of(self.ages[name], own), self.steps).to(values.dtype)
            before *= 1.0 - decay()
            values.copy_(torch.lerp(before, values, share.view(-1, *[1] * (values.dim() - 1))))

    def follow(self, changes: Mapping[str, Change]) -> None:
        """After a change of connections: what has grown is of age 0."""
        for name, change in changes.items():
            if name in self.ages:
                self.ages[name] = remap(self.ages[name], change.source.to(self.ages[name].device))
                self._youngest[name] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Ages by layer."""
        return dict(self.ages)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, of the layers as they are. Raises InputError for anything else."""
        # Not all keep a mapping that is empty (torch's distributed checkpoints do not).
        require_state("Ramp", state, self.ages)
        for name, own in self.ages.items():
            if state[name].shape != (self._layers[name].topology.count,):
                raise InputError(f"the ages of the connections of {name} are not this model's: load its state first")
            self.ages[name] = state[name].to(own, copy=True)
            self._youngest[name] = int(self.ages[name].min()) if self.ages[name].numel() else 0


def refuse_ramp(
    rule: Rule[Any], horizon: Horizon, layers: Mapping[str, SparseLinear], optimizer: torch.optim.Optimizer
) -> None:
    """Raise InputError where a rule's ramp cannot hold an optimizer of the layers back, or would its weight decay.

    And where `AdamW` has them in one group with another Sparsifier's, which ramp otherwise: a group has one ramp.
    """
    evolves, steps = _evolves(rule, horizon), rule.ramp_steps(horizon)
    for layer in _others(layers, optimizer).values() if steps or evolves else ():
        refuse_ahead(optimizer, layer.values)
        decay_of(optimizer, layer.values)
    own = {id(layer.values) for layer in layers.values()}
    beside = {id(p) for group in _counting(layers, optimizer) for p in group["params"]} - own
    for other in _LIVE:
        theirs = {id(layer.values) for layer in other._layers.values()}
        differs = (other.steps, other._first) != (steps, rule.ramp_first)
        is_apart = own.isdisjoint(theirs) and not beside.isdisjoint(theirs)
        if is_apart and (differs or evolves or _evolves(other.rule, horizon)):
            raise InputError(
                "another Sparsifier's layers share a group of the optimizer with these, and have another ramp "
                f"({other.steps} steps, not {steps}): give them groups of their own (parameter_groups(part))"
            )


def _evolves(rule: Rule[Any], horizon: Horizon) -> bool:
    return rule.ramp_in_force(rule.initial_state(), horizon) is not None


def _counting(layers: Mapping[str, SparseLinear], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups of layers whose optimizer counts; loading an optimizer's state replaces them."""
    own = {id(layer.values) for layer in layers.values()}
    groups = (group for part in parts_of(optimizer) if isinstance(part, AdamW) for group in part.param_groups)
    return [g for g in groups if g["per_weight_step"] and not own.isdisjoint(map(id, g["params"]))]


def _others(layers: Mapping[str, SparseLinear], optimizer: torch.optim.Optimizer) -> dict[str, SparseLinear]:
    """The layers whose optimizer does not count."""
    counted = {id(p) for group in _counting(layers, optimizer) for p in group["params"]}
    return {name: layer for name, layer in layers.items() if id(layer.values) not in counted}


# Of all Sparsifiers, for the sake of those that share an optimizer.
_LIVE: WeakSet[Ramp] = WeakSet()


def _ages(layer: SparseLinear, age: int) -> Tensor:
    return torch.full((layer.topology.count,), age, dtype=torch.int32, device=layer.values.device)
