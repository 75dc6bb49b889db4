"""The names of a model's modules, without what wrappers put in front of them.

`torch.compile` calls a model `_orig_mod`, data parallelism `module`. What is written under the name of a module (a
state, head layouts, densities) has to fit the plain model as well as the wrapped one.
"""

from __future__ import annotations

from torch import nn

_LEVELS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model by its plain name, in the model's order; a wrapper's name is that of what it wraps."""
    return {plain: module for _, plain, module in _walk(model)}


def innermost(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around the whole of it."""
    return modules_by_name(model)[""]


def full_names(model: nn.Module) -> dict[str, str]:
    """By plain name: the name that `model.named_modules()` gives, wrappers included."""
    return {plain: full for full, plain, _ in _walk(model)}


def below(root: str, name: str) -> str:
    """The name of a module from the name of one above it and its own below that; each may be empty."""
    return f"{root}.{name}" if root and name else root or name


def _walk(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(full name, plain name, module), parents first."""
    seen: dict[str, tuple[str, nn.Module]] = {}
    for full, module in model.named_modules():
        plain = full
        if full:
            above, _, last = full.rpartition(".")
            parent_name, parent = seen[above]
            below = f"{parent_name}.{last}" if parent_name else last
            plain = parent_name if _is_level(parent, last) else below
        seen[full] = (plain, module)
    return [(full, plain, module) for full, (plain, module) in seen.items()]


def _is_level(parent: nn.Module, name: str) -> bool:
    """Whether a child's name is only a wrapper's: `module` is one where the parent has nothing else."""
    return name in _LEVELS or (name == "module" and list(parent._modules) == ["module"] and not parent._parameters)
