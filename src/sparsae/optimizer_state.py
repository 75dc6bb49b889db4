"""What an optimizer keeps of sparse values, and how that follows when connections move.

Which entries of its state have a part for each unit is told by their shape: that of the values, or a reduction of it
over the sides of a block (factored second moments). What has no side that could be the units is common to them and
stays. An optimizer with anything else (preconditioners, histories over all parameters, buffers of its own) is refused,
before anything has changed.

What is new starts from zeros, as a new parameter's moments do, or from what the optimizer's settings say (`_STARTS`);
but a copy of the weights (slow, averaged or first ones) starts from the new weight.

A parameter can also be succeeded by another: by the values of a layer that becomes sparse, or by the weight of one that
becomes dense. The successor stands in the old one's place in the groups, and of the state it takes over what has a
number for each weight.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsae.core.quantized import floats_of, is_quantized, quantized_as
from sparsae.core.shards import is_sharded, local, spread, whole
from sparsae.core.topology import remap
from sparsae.errors import InputError

# The parameters of layers by name: (nnz,) or (blocks, b_out, b_in).
Values = Mapping[str, Tensor]

# Refused before they have made a state: some of them could not even hold it.
_REFUSED = {
    "LBFGS": "its history is one vector over all parameters",
    "SparseAdam": "it takes sparse gradients, and those of values are dense",
    "Muon": "it takes matrices, and values are none",
    "AccSGD": "its momentum is a copy of the weights",
    **dict.fromkeys(
        ("Shampoo", "ScalableShampoo", "DistributedShampoo", "Kron"),
        "its preconditioners hold pairs of connections, which mean nothing once connections move",
    ),
}
MOMENTS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "variance"),
}
_WEIGHT_COPIES = {
    *("z", "ax", "p0", "x0", "x_k", "old_p", "prev_param", "param_buffer", "shadow", "ema", "backup_params"),
    *("slow_params", "slow_param", "slow_buffer", "lookahead_params", "lookahead_slow_buff"),
}
# What does not start from zeros: the setting of the parameter's group that says from what (Rprop's, Adagrad's,
# Yogi's), or a number (Adai's).
_STARTS: dict[str, str | float] = {
    "step_size": "lr",
    "sum": "initial_accumulator_value",
    "beta1_prod": 1.0,
    **dict.fromkeys(("exp_avg", "exp_avg_sq"), "initial_accumulator"),
}
_MOVED, _CONVERTED = "connections that move", "layers that become sparse or dense"
_ANEW = "leave out `optimizer`, and make a new one afterwards"
_INSTEAD = "use one with a number or a row of a block for each weight (AdamW, SGD, Adafactor), or rule 'static'"
_INSTEADS = {_MOVED: _INSTEAD, _CONVERTED: _ANEW}


@dataclass(frozen=True, eq=False)
class _Entry:
    """One tensor, or what should be one, of an optimizer's state of one layer."""

    owner: str
    layer: str
    state: MutableMapping[str, Any]
    key: str
    tensor: Any
    start: float = 0.0

    def refusal(self, why: str) -> InputError:
        return _refusal(self.owner, f"its '{self.key}' of {self.layer} {why}")


def refuse_unsupported(optimizer: Optimizer, values: Values) -> None:
    """Raise InputError for an optimizer that is known, before its first step, not to follow connections that move."""
    _refuse_by_name(optimizer, _MOVED)
    _refuse_own_tensors(optimizer, values)


def refuse_unmovable(optimizer: Optimizer, values: Values) -> None:
    """Raise InputError where anything in the optimizer's state could not follow a change of connections."""
    _refuse_own_tensors(optimizer, values)
    for entry in _moving(optimizer, values):
        if entry.key in MOMENTS | _WEIGHT_COPIES or "grad" in entry.key:
            continue
        own, floats = values[entry.layer].detach(), floats_of(entry.tensor)
        if floats.shape == own.shape and floats.is_floating_point() and _resembles(whole(floats), whole(own)):
            raise entry.refusal(
                "looks like a copy of the weights under a name that is not known for one: "
                "whether it starts a new connection from zero or from its weight cannot be told"
            )


def follow(optimizer: Optimizer, values: Values, changes: Mapping[str, tuple[Tensor, Tensor]]) -> Callable[[str], None]:
    """Get the state ready for a change; the function that is returned moves that of one layer.

    changes: by layer, each new unit's old position (-1: it is new) and the new values. Raises InputError where
    something in the state of any layer cannot follow; nothing has changed then, and nothing fails afterwards.
    """
    entries: dict[str, list[_Entry]] = {}
    for entry in _moving(optimizer, values):
        entries.setdefault(entry.layer, []).append(entry)

    def move(layer: str) -> None:
        source, new_values = changes[layer]
        for entry in entries.get(layer, ()):
            before = whole(floats_of(entry.tensor))
            after = remap(before, source.to(before.device))
            new = (source < 0).to(after.device)
            if entry.start:
                after[new] = entry.start
            if entry.key in _WEIGHT_COPIES:
                after[new] = whole(new_values).to(after.device, after.dtype)[new]
            entry.state[entry.key] = spread(quantized_as(entry.tensor, after), entry.tensor)

    return move


@dataclass(frozen=True, eq=False)
class Successor:
    """Parameters that take others' places: one another's, or several that of one, or one that of several.

    carry: makes, of one tensor with the shape of each old parameter, one for each new. names: what the old and the new
    ones are called, after what their names have in common.
    """

    old: Sequence[nn.Parameter]
    new: Sequence[nn.Parameter]
    carry: Callable[[list[Tensor]], list[Tensor]]
    names: tuple[Sequence[str], Sequence[str]]


def succession(optimizer: Optimizer, successors: Mapping[str, Successor]) -> Callable[[], None]:
    """Get an optimizer ready for parameters to be succeeded, by layer; the function that is returned does it.

    Gradients are carried over too. Raises InputError where the optimizer does not have a parameter that trains, and
    where something that it keeps of one cannot be carried; nothing has changed then, and nothing fails afterwards.
    """
    _refuse_by_name(optimizer, _CONVERTED)
    parts = parts_of(optimizer)
    olds = {
        name if len(successor.old) == 1 else f"{name}, part {i}": old
        for name, successor in successors.items()
        for i, old in enumerate(successor.old)
    }
    _require_groups(parts, olds, successors)
    _refuse_own_tensors(optimizer, olds, _CONVERTED)
    for entry in _entries(optimizer, olds):
        is_known = _is_ordinary(entry.tensor)
        if not is_known or entry.tensor.shape not in (olds[entry.layer].shape, (1,)):
            what = f"has shape {tuple(entry.tensor.shape)}" if is_known else f"is a {type(entry.tensor).__name__}"
            why = f"its '{entry.key}' of {entry.layer} {what}, not a number for each weight; {_ANEW}"
            raise _refusal(entry.owner, why, _CONVERTED)

    # All of it before anything changes, so that no memory can run out in the middle.
    carried: dict[int, list[dict[str, Any]]] = {}  # by the state of the first old one, which parts may share
    for part in parts:
        for name, successor in successors.items():
            # Membership first: a defaultdict would make an entry.
            states = [part.state[old] for old in successor.old if old in part.state]
            if states and id(states[0]) not in carried:
                carried[id(states[0])] = _carried(part, name, successor, states)
    gradients = {
        name: s.carry([torch.zeros_like(old) if old.grad is None else old.grad for old in s.old])
        for name, s in successors.items()
        if any(old.grad is not None for old in s.old)
    }

    def succeed() -> None:
        for name, successor in successors.items():
            for new, gradient in zip(successor.new, gradients.get(name, ()), strict=False):
                new.grad = gradient
            for part in parts:
                _replace(part, successor, carried)

    return succeed


def _require_groups(parts: list[Optimizer], olds: Values, successors: Mapping[str, Successor]) -> None:
    """Raise InputError for a parameter that no group has, two layers that share one, and parts in different groups."""
    groups = [{id(p) for p in group["params"]} for part in parts for group in part.param_groups]
    owners: dict[int, str] = {}
    for name, old in olds.items():
        if old.requires_grad and not any(id(old) in group for group in groups):
            raise InputError(f"the optimizer does not have the parameter of {name}: give the one that trains the model")
        if (other := owners.setdefault(id(old), name)) != name:
            raise InputError(f"layers {other} and {name} share their parameter, which can have one successor only")
    for name, successor in successors.items():
        if any(len({id(old) in group for old in successor.old}) > 1 for group in groups):
            raise InputError(f"the parts of {name} are in different groups of the optimizer; {_ANEW}")


def _carried(
    part: Optimizer, name: str, successor: Successor, states: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The states of the new parameters; of what is no number for each weight, each has the first old one's."""
    first, *others = states
    if len(states) < len(successor.old) or any(other.keys() != first.keys() for other in others):
        why = f"it does not keep the same of all parts of {name}; {_ANEW}"
        raise _refusal(type(part).__name__, why, _CONVERTED)
    after: list[dict[str, Any]] = [{} for _ in successor.new]
    for key, value in first.items():
        new = [value, *(copy.deepcopy(value) for _ in successor.new[1:])]
        if not _is_plain(value) and value.shape == successor.old[0].shape:
            tensors = successor.carry([floats_of(state[key]) for state in states])
            if start := _start(part, successor.old[0], key):
                there = successor.carry([torch.ones_like(old) for old in successor.old])
                tensors = [torch.where(one > 0, tensor, start) for tensor, one in zip(tensors, there, strict=True)]
            new = [quantized_as(value, tensor) for tensor in tensors]
        for state, own in zip(after, new, strict=True):
            state[key] = own
    return after


def _replace(part: Optimizer, successor: Successor, carried: Mapping[int, list[dict[str, Any]]]) -> None:
    olds = {id(old) for old in successor.old}
    for group in part.param_groups:
        places = [i for i, parameter in enumerate(group["params"]) if id(parameter) in olds]
        if not places:
            continue
        at = places[0]
        if "param_names" in group:
            names = group["param_names"]
            root = names[at].removesuffix(next(n for n in successor.names[0] if names[at].endswith(n)))
            kept = [name for i, name in enumerate(names) if i not in places]
            names[:] = [*kept[:at], *(root + name for name in successor.names[1]), *kept[at:]]
        kept = [parameter for parameter in group["params"] if id(parameter) not in olds]
        group["params"][:] = [*kept[:at], *successor.new, *kept[at:]]
    if successor.old[0] in part.state:
        first, *_ = [part.state.pop(old) for old in successor.old]
        states = carried[id(first)]
        first.update(states[0])
        for new, state in zip(successor.new, [first, *states[1:]], strict=True):
            part.state[new] = state


def _refuse_own_tensors(optimizer: Optimizer, values: Values, what: str = _MOVED) -> None:
    """Raise InputError where a tensor that could hold a layer's state lies where nothing says whose it is.

    So does a parameter where it stays itself only: connections may move in it.
    """
    parts = parts_of(optimizer)
    known = {id(p) for part in parts for group in part.param_groups for p in group["params"]}
    if what == _CONVERTED:
        known -= {id(p) for p in values.values()}
    sizes = [p.shape[0] if what == _MOVED else p.numel() for p in values.values() if p.shape[0]]
    least = min(sizes, default=math.inf)
    for part in parts:
        places = {key: value for key, value in vars(part).items() if key not in ("param_groups", "state")}
        places |= {str(key): value for key, value in part.state.items() if not isinstance(key, Tensor)}
        for group in part.param_groups:
            places |= {key: value for key, value in group.items() if key != "params"}
        for place, value in places.items():
            if any(id(tensor) not in known and tensor.numel() >= least for tensor in _within(value, Tensor)):
                raise _refusal(
                    type(part).__name__, f"it keeps tensors of its own in '{place}'; {_INSTEADS[what]}", what
                )


def _refuse_by_name(optimizer: Optimizer, what: str) -> None:
    for part in parts_of(optimizer):
        for kind in type(part).__mro__:
            if kind.__name__ in _REFUSED:
                raise _refusal(kind.__name__, f"{_REFUSED[kind.__name__]}; {_INSTEADS[what]}", what)


def _refusal(owner: str, why: str, what: str = _MOVED) -> InputError:
    return InputError(f"{owner} cannot follow {what}: {why}")


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it wraps, at any depth."""
    found = [optimizer]
    for part in found:
        attributes = [value for key, value in vars(part).items() if key not in ("param_groups", "state", "defaults")]
        found += [inner for inner in _within(attributes, Optimizer) if all(inner is not other for other in found)]
    return found


def _within(thing: Any, kind: type[Any]) -> Iterator[Any]:
    """Everything of a kind in nested containers."""
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, Mapping):
        yield from _within(list(thing.values()), kind)
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        for item in list(thing):
            yield from _within(item, kind)


def _moving(optimizer: Optimizer, values: Values) -> list[_Entry]:
    """The entries with a part for each unit. Raises InputError where that cannot be told, or for what is none."""
    by_key: dict[tuple[str, str], list[_Entry]] = {}
    for entry in _entries(optimizer, values):
        if not isinstance(entry.tensor, Tensor):
            raise entry.refusal(f"is more than a tensor ({type(entry.tensor).__name__}); {_INSTEAD}")
        by_key.setdefault((entry.owner, entry.key), []).append(entry)
    moving = []
    for entries in by_key.values():
        readings = [_readings(entry.tensor.shape, values[entry.layer].shape) for entry in entries]
        for entry, reading in zip(entries, readings, strict=True):
            if not reading:
                shape = tuple(entry.tensor.shape)
                raise entry.refusal(f"has shape {shape}, which has no part for each connection; {_INSTEAD}")
        # One layer of as many blocks as a block has rows can be read in two ways; the others tell which is meant.
        common = set.intersection(*readings)
        if len(common) != 1:
            shape = tuple(entries[0].tensor.shape)
            raise entries[0].refusal(f"has shape {shape}: whether it has a part for each block cannot be told")
        if common == {"unit"}:
            moving += entries
    for entry in moving:
        if not _is_ordinary(entry.tensor):
            raise entry.refusal(f"is a {type(entry.tensor).__name__}; {_INSTEAD}")
        if entry.key in _WEIGHT_COPIES and entry.tensor.shape != values[entry.layer].shape:
            raise entry.refusal("is a copy of some of the weights only")
    return moving


def _entries(optimizer: Optimizer, values: Values) -> Iterator[_Entry]:
    """All that is kept of parameters, but for what is the same however many weights there are."""
    seen: set[int] = set()
    for part in parts_of(optimizer):
        for name, parameter in values.items():
            state = part.state.get(parameter)
            if state is None or id(state) in seen:
                continue
            seen.add(id(state))
            for key, value in state.items():
                if not _is_plain(value):
                    yield _Entry(type(part).__name__, name, state, key, value, _start(part, parameter, key))


def _start(part: Optimizer, parameter: Tensor, key: str) -> float:
    """What a new weight's entry under this key starts from."""
    start = _STARTS.get(key, 0.0)
    if not isinstance(start, str):
        return start
    if all(start not in group for group in part.param_groups):
        return 0.0
    groups = (group for group in part.param_groups if any(own is parameter for own in group["params"]))
    return float(next(groups, {}).get(start, 0.0))


def _is_plain(value: Any) -> bool:
    """Whether a value, or everything in it, is a number or a text: nothing that has to follow."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (Number, str, torch.dtype, torch.device))


def _readings(state: torch.Size, values: torch.Size) -> set[str]:
    """What a state's shape can mean: "unit", its first side is the units; "common", it has no such side."""
    units, block = values[:1], tuple(values[1:])
    if state == values:
        return {"unit"}
    readings = set()
    if state[:1] == units and _reduces(tuple(state[1:]), block):
        readings.add("unit")
    if _reduces(tuple(state), block) or (state[0] == 1 and _reduces(tuple(state[1:]), block)):
        readings.add("common")
    return readings


def _reduces(shape: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Whether a block becomes this shape when some of its sides are summed over, and kept as 1 or left out."""
    if not block:
        return not shape
    kept = bool(shape) and shape[0] in (1, block[0]) and _reduces(shape[1:], block[1:])
    return kept or _reduces(shape, block[1:])


def _is_ordinary(thing: Any) -> bool:
    """Whether it is a tensor whose numbers can be moved."""
    own = local(thing) if is_sharded(thing) else thing
    return type(own) in (Tensor, nn.Parameter) or (isinstance(thing, Tensor) and is_quantized(thing))


def _resembles(state: Tensor, values: Tensor) -> bool:
    size = float(values.float().norm())
    return 0 < size < math.inf and float((state.float() - values.float()).norm()) <= 0.1 * size
