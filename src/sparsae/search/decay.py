"""What an optimizer does to a value beside the step along its gradient: a ramp holds back the one and not the other.

A weight decay that is decoupled shrinks each value by a share of itself, whatever its gradient; one that is added to
the gradient (L2) is a part of it, and of the step. Which of the two an optimizer has, and at which rate, is its own
affair: here are those that are known. A ramp on another that decays is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sparsae.errors import InputError
from sparsae.optimizer_state import parts_of

# The share of each value that is taken; asked for after the step, of which some know their rate only then.
Decay = Callable[[], float]
Group = Mapping[str, Any]
State = Callable[[], Mapping[str, Any]]  # of the values, as it is then

# These compute weights from copies that they keep of them, which go ahead at the whole rate: by name, and by the copy.
_AHEAD = ("ScheduleFree", "Lookahead", "MADGRAD", "Ranger21")
_COPIES = frozenset({"z", "x0", "slow_params", "slow_param", "slow_buffer", "lookahead_params", "lookahead_slow_buff"})


def decay_of(optimizer: Optimizer, values: Tensor) -> Decay:
    """Of a parameter of the optimizer, before a step. InputError for a decay of which it is not known what it does."""
    unknown = ""
    for part in parts_of(optimizer):
        for group in part.param_groups:
            if not any(p is values for p in group["params"]):
                continue
            known = next((_KNOWN[kind] for kind in map(_place, type(part).__mro__) if kind in _KNOWN), None)
            if known is not None:
                return known(part, group, partial(_state_of, part, values))
            unknown = type(part).__name__ if float(group.get("weight_decay") or 0.0) else unknown
    if unknown:
        raise InputError(
            f"{unknown} cannot ramp grown connections: how its weight decay acts, which a ramp leaves as it is, is not "
            "known: set weight_decay to 0 in the groups of sparse values, use AdamW, or set the rule's ramp to 0"
        )
    return lambda: 0.0


def _state_of(part: Optimizer, values: Tensor) -> Mapping[str, Any]:
    state: Mapping[str, Any] = part.state.get(values, {})
    return state


def refuse_ahead(optimizer: Optimizer, values: Tensor) -> None:
    """InputError for an optimizer that would undo a ramp, which is made of what its step did."""
    for part in parts_of(optimizer):
        name, copies = type(part).__name__, _COPIES & part.state.get(values, {}).keys()
        if copies or any(known in name for known in _AHEAD):
            kept = f" ('{min(copies)}')" if copies else ""
            raise InputError(
                f"{name} cannot ramp grown connections: it computes weights from copies of its own{kept}, which go "
                "ahead of a ramp: use AdamW, or set the rule's ramp to 0"
            )


def _rate(group: Group) -> float:
    return float(group["lr"]) * float(group["weight_decay"])


def _decoupled(part: Any, group: Group, state: State) -> Decay:
    """theta <- (1 - lr wd) theta."""
    return lambda: _rate(group)


def _none(part: Any, group: Group, state: State) -> Decay:
    """None, or added to the gradient."""
    return lambda: 0.0


def _by_flag(flag: str) -> Callable[[Any, Group, State], Decay]:
    def decay(part: Any, group: Group, state: State) -> Decay:
        if not group.get(flag, False):
            return lambda: 0.0
        # pytorch_optimizer's: without the learning rate.
        return lambda: float(group["weight_decay"]) if group.get("fixed_decay") else _rate(group)

    return decay


def _adan(part: Any, group: Group, state: State) -> Decay:
    """theta <- (theta - step) / (1 + lr wd), where it is not as AdamW's."""
    return lambda: _rate(group) if group["weight_decouple"] else 1.0 - 1.0 / (1.0 + _rate(group))


def _asgd(part: Any, group: Group, state: State) -> Decay:
    """theta <- (1 - lambda eta) theta, by the eta that the step before has left; weight_decay is in the gradient."""
    share = float(group["lambd"]) * float(state().get("eta", group["lr"]))
    return lambda: share


def _torchao(part: Any, group: Group, state: State) -> Decay:
    return lambda: _rate(group) if part.is_adamw else 0.0


def _adafactor(part: Any, group: Group, state: State) -> Decay:
    """transformers': by the rate of the step, which may be relative to the weights' size before it."""
    return lambda: float(group["weight_decay"]) * float(part._get_lr(group, state()))


def _place(kind: type) -> str:
    """The package of a class and its name."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


_KNOWN: Mapping[str, Callable[[Any, Group, State], Decay]] = {
    "sparsae.AdamW": _decoupled,
    "torch.Adafactor": _decoupled,
    "torch.ASGD": _asgd,
    **{f"torch.{name}": _by_flag("decoupled_weight_decay") for name in ("Adam", "NAdam", "RAdam")},
    **{f"torch.{name}": _none for name in ("Adadelta", "Adagrad", "Adamax", "RMSprop", "Rprop", "SGD")},
    "transformers.Adafactor": _adafactor,
    "torchao._AdamBase": _torchao,
    **{f"pytorch_optimizer.{name}": _by_flag("weight_decouple") for name in ("Lion", "CAME")},
    "pytorch_optimizer.SOAP": _decoupled,
    "pytorch_optimizer.Adan": _adan,
}
