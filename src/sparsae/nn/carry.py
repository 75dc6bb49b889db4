"""What a module is to everybody else, taken over by the module that replaces it."""

from __future__ import annotations

import weakref
from collections.abc import Set
from typing import Any

from torch import nn

from sparsae.errors import InputError, argument

_CONTAINERS = ("_parameters", "_buffers", "_modules")
_BARE = frozenset(vars(nn.Module()))
_HOOKS = tuple(key for key in vars(nn.Module()) if key.endswith(("hooks", "hook")) or "_hooks_" in key)


def own_names(blank: nn.Module) -> frozenset[str]:
    """The attributes, parameters and buffers that a new module of a class has for itself."""
    return frozenset(vars(blank)) - _BARE | {key for kind in _CONTAINERS for key in vars(blank)[kind]}


def carry_module(name: str, old: nn.Module, new: nn.Module, own: Set[str], reserved: Set[str] = frozenset()) -> None:
    """Mode, hooks, and the parameters, buffers, children and attributes of `old` that are not `own` of its class.

    Hooks stay in their dictionaries, so that their handles still remove them. Raises InputError for something whose
    name `new` has `reserved`; then both modules are as they were, but for attributes that `new` has got.
    """
    for key, value in vars(old).items():
        if key not in own and key not in _BARE:
            _refuse(name, key, new, reserved)
            vars(new)[key] = value
    for kind in _CONTAINERS:
        for key, value in vars(old)[kind].items():
            if key not in own:
                _refuse(name, key, new, reserved)
                vars(new)[kind][key] = value
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set - own
    new.training = old.training
    for key in _HOOKS:
        vars(new)[key] = vars(old)[key]


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """After `new` took the place of `old`: hooks that hold the module that they are called with hold `new`."""
    hooks: dict[int, Any] = new._load_state_dict_pre_hooks
    for hook in hooks.values():
        if getattr(hook, "with_module", False) and hook.module() is old:
            hook.module = weakref.ref(new)


def without_hooks(module: nn.Module) -> None:
    """Give a module empty dictionaries of hooks of its own."""
    vars(module).update({key: value for key, value in vars(nn.Module()).items() if key in _HOOKS})


def carry_parameter(name: str, old: nn.Parameter, new: nn.Parameter) -> None:
    """Whether it trains, and what somebody wrote on it. Raises InputError for hooks, which expect the old shape."""
    if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
        raise InputError(
            f"layer {name} has a hook on its weight's gradient, which changes its shape: "
            "remove the hook, and add it after the conversion"
        )
    new.requires_grad_(old.requires_grad)
    vars(new).update(vars(old))


def _refuse(name: str, key: str, new: nn.Module, reserved: Set[str]) -> None:
    if key in reserved or (reserved and hasattr(type(new), key)):
        raise InputError(
            f"layer {name} has an attribute '{key}', which {type(new).__name__} needs itself: "
            f"rename it, or leave the layer out with {argument('exclude')}"
        )
