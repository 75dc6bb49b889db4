"""Whether the loop around a `Sparsifier` lets it work: what was forgotten, or happens in the wrong order, is told.

What silently ends the search is an error. What may be meant (a step that a gradient scaler skips), or is not certain
(that another optimizer made it), is logged, once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.complaints import shown
from sparsae.config.rules import RuleConfig
from sparsae.config.span import Horizon
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.host import on_host
from sparsae.core.shards import local
from sparsae.errors import InputError
from sparsae.nn.arguments import require_arguments
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.optim import AdamW
from sparsae.optimizer_state import MOMENTS, parts_of, refuse_unmovable
from sparsae.rules.parts.rule import Rule

log = logging.getLogger(__name__)

# These keep moments of every parameter that has made a step. By their type alone: a class of somebody's own that is
# made of one may keep them elsewhere.
_KEEPERS = (AdamW, torch.optim.Adam, torch.optim.AdamW)
# What an optimizer keeps of a parameter, and changes in its every step.
_CHANGING = MOMENTS | {"step"}


@dataclass(frozen=True, eq=False)
class _Before:
    """Values of a layer before the step that has to change them, and what the optimizer keeps of them."""

    layer: str
    values: Tensor
    kept: list[Tensor]


class LoopCalls:
    """Follows `before_step` and `after_step` of one loop in which connections move, by a rule or a density schedule."""

    def __init__(
        self, rule: Rule[Any], layers: Mapping[str, SparseLinear], optimizer: torch.optim.Optimizer, moves: bool
    ) -> None:
        """moves: whether any connection does."""
        self._rule, self._layers, self._optimizer, self._is_moved = rule, layers, optimizer, moves
        self._wants_gradients = bool(rule.needs & {"gradient", "gradient_at", "dense_gradient"})
        self._between = False  # before_step() was called, and after_step() was not yet
        self._before: _Before | None = None
        self._told: set[str] = set()
        # State exists after the first step; but a first step may have been skipped, and state may be made later.
        self._checks_state = True
        self._is_loaded = False

    def loaded(self) -> None:
        """After a state of a training that had begun: what the optimizer kept of its steps has to be there, too."""
        self._is_loaded = True

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
        if self._is_loaded:
            self._is_loaded = False
            bare = [n for n, values in learning.items() if self._keeps(values) and not _kept(self._optimizer, values)]
            if bare:
                self._tell(
                    "loaded",
                    f"the Sparsifier continues from a step after the first, and its {type(self._optimizer).__name__} "
                    f"keeps nothing yet of the values of {bare[0]}: load the optimizer's state too, if it was not left "
                    "out on purpose",
                )
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
            values = learning[name]
            kept = [own.clone() for own in _kept(self._optimizer, values)]
            self._before = _Before(name, local(values.detach()).clone(), kept)

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
        if self._before is not None and stepped:
            self._compare(self._before)
        self._before = None

    def _compare(self, before: _Before) -> None:
        name, values = before.layer, self._layers[before.layer].values
        pairs = [(before.values, local(values.detach())), *_pairs(before.kept, _kept(self._optimizer, values))]
        # A device is waited for once.
        said = on_host([torch.stack([(old != new).any(), old.any() | new.any()]) for old, new in pairs])
        (changed, _), *state = (answers.tolist() for answers in said)
        # A buffer of zeros tells nothing: the optimizer may have no use for it.
        used = [changes for changes, is_used in state if is_used]
        if not changed:
            self._tell(
                "step",
                f"the values of {name} are the same in after_step() as in before_step(), and have a gradient: "
                "call optimizer.step() between the two, if it was not skipped on purpose",
            )
        elif not any(used) and (used or self._keeps(values)):
            owner = type(self._optimizer).__name__
            self._tell(
                "optimizer",
                f"the values of {name} changed between before_step() and after_step(), and what the Sparsifier's "
                f"{owner} keeps of them did not: another optimizer seems to have made the step, and what that keeps "
                "stays with the wrong connections when they move; give Sparsifier the optimizer that steps",
            )

    def _keeps(self, values: Tensor) -> bool:
        """Whether the optimizer is known to keep something of values that have made a step."""
        part = parts_of(self._optimizer)[-1]
        return type(part) in _KEEPERS and any(p is values for group in part.param_groups for p in group["params"])

    def _moves(self, values: Tensor) -> bool:
        """Whether the next step changes values: their gradient is finite and not zero, and their rate is not zero."""
        groups = (group for group in self._optimizer.param_groups if any(p is values for p in group["params"]))
        at_rest = any(group.get("lr") is not None and float(group["lr"]) == 0 for group in groups)
        gradient = None if values.grad is None else local(values.grad)
        return gradient is not None and not at_rest and bool(gradient.isfinite().all() & gradient.any())

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s", what)


def _kept(optimizer: torch.optim.Optimizer, values: Tensor) -> list[Tensor]:
    """What the optimizer keeps of the values, and changes in every step; nothing where that is not known."""
    states = [part.state.get(values, {}) for part in parts_of(optimizer)]
    entries = [state[key] for state in states for key in state if key in _CHANGING]
    tensors = [local(torch.as_tensor(entry)).detach() for entry in entries if isinstance(entry, Tensor | float | int)]
    return [own for own in tensors if type(own) is Tensor and not own.is_meta]  # a quantized one has a type of its own


def _pairs(before: list[Tensor], after: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What was kept before a step with what is kept after it; with zeros, where the two are not of the same tensors."""
    shapes, others = ([(own.device, own.shape) for own in kept] for kept in (before, after))
    if shapes == others:
        return list(zip(before, after, strict=True))
    return [(torch.zeros_like(own), own) for own in after or before]


def require_loop(model: object, optimizer: object, config: object, **functions: object) -> None:
    """Raises InputError where what a `Sparsifier` is given is not what its place wants. functions: or None."""
    require_arguments(model=model)
    if not all(hasattr(optimizer, name) for name in ("param_groups", "state", "step")):
        raise InputError(f"optimizer: must be one torch optimizer, not {shown(optimizer)}")
    if isinstance(config, RuleConfig):
        kind = type(config).__name__
        raise InputError(
            f"config: must be a SparsifierConfig, with a rule as its topology, not the rule's own settings: "
            f"SparsifierConfig(steps=..., topology={kind}(...))"
        )
    if not isinstance(config, SparsifierConfig):
        raise InputError(
            f"config: must be a SparsifierConfig, such as SparsifierConfig(steps=10_000), not {shown(config)}"
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise InputError(f"{name}: must be a function, not {shown(function)}")


def tell_if_still(rule: Rule[Any], horizon: Horizon) -> None:
    """Log that a rule never moves a connection in a run, though it is one that does."""
    if rule.moves and not any(rule.updates(horizon)):
        log.warning(
            "rule '%s' moves no connection in %d steps: the topology stays as it is drawn (set topology.every lower)",
            rule.name,
            horizon.steps,
        )


def tell_if_beyond(step: int, rule: Rule[Any], horizon: Horizon) -> None:
    """Log the first step after the last one that a run was said to have: the rule had ended before the training."""
    if rule.moves and step == horizon.steps + 1:
        log.warning(
            "step %d is beyond the %d of SparsifierConfig.steps, the length of the whole training, where all schedules "
            "have ended",
            step,
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


def tell_added(model: nn.Module, layers: Mapping[str, SparseLinear], told: set[str]) -> None:
    """Log the layers that train and are not among these, each once: their connections never move."""
    known = {id(layer) for layer in layers.values()}
    others = {name: layer for name, layer in sparse_layers(model).items() if id(layer) not in known}
    added = [name for name, layer in others.items() if layer.values.requires_grad and name not in told]
    if added:
        told.update(added)
        log.warning(
            "layer %s was made sparse after Sparsifier was made (%d such layers): its connections do not move; make "
            "another Sparsifier, and close() this one",
            added[0],
            len(added),
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
