"""The units that a dense model begins with where they are given: its weights that are not zero, or a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from reprlib import repr
from typing import Literal

import torch
from torch import Tensor, nn

from sparsae.config.unit import Quota
from sparsae.core.groups import Groups
from sparsae.core.topology import Topology, grid_size, index_dtype
from sparsae.errors import InputError
from sparsae.nn.choice import Choice, layer_shapes
from sparsae.nn.conversion import DensePlace, dense_matrices, dense_places
from sparsae.nn.dense import strongest
from sparsae.nn.kinds.kind import KINDS
from sparsae.nn.limits import require_quota

Start = Literal["random", "magnitude", "nonzero"] | Mapping[str, Tensor]
_NAMES = ("random", "magnitude", "nonzero")


def require_start(start: object) -> None:
    """Raises ValueError for what is no start."""
    if isinstance(start, Mapping):
        if not start:
            raise ValueError("the mask has no layer; give a bool tensor by the name of each that becomes sparse")
        for name, mask in start.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                what = mask.dtype if isinstance(mask, Tensor) else repr(mask)
                raise ValueError(f"the mask of {name} must be a bool tensor, not {what}")
    elif not isinstance(start, str) or start not in _NAMES:
        options = ", ".join(f"'{name}'" for name in _NAMES)
        raise ValueError(f"must be {options} or masks by name, not {repr(start)}")


def given_topologies(
    model: nn.Module, start: Start, choice: Choice, unit: tuple[int, int], quota: Quota | None
) -> tuple[Choice, dict[str, nn.Module], dict[str, Topology]]:
    """What is chosen, the dense modules that become sparse, and the topologies of their layers by name.

    start: "nonzero" or masks. A module without any zero stays dense. Raises InputError where nothing is pruned, a mask
    does not fit, a layer would have no unit at all, or does not keep a quota: of nonzero weights there may be fewer,
    and zeros make up for them.
    """
    if isinstance(start, Mapping):
        choice, targets, active = _masked(model, start, choice)
    else:
        targets = choice.layers(model)
        active = {name: matrix_OI != 0 for name, matrix_OI in dense_matrices(targets).items()}
        pruned = {id(place.module) for name, place in dense_places(targets).items() if not active[name].all()}
        if not pruned:
            raise InputError("start 'nonzero': no weight is zero: prune the model first, or take start 'magnitude'")
        targets = {name: module for name, module in targets.items() if id(module) in pruned}
        active = {name: active[name] for name in dense_places(targets)}
        choice = replace(choice, include=tuple(map(escape, targets)), exclude=())
    if quota is not None:
        require_quota(layer_shapes(targets), quota)
        topologies = {name: _with_quota(name, mask, quota, whole=start != "nonzero") for name, mask in active.items()}
    else:
        topologies = {name: _topology(name, mask, unit, whole=start != "nonzero") for name, mask in active.items()}
    return choice, targets, topologies


def require_sparsity(asked: float | None, topologies: Mapping[str, Topology]) -> float:
    """The sparsity of given topologies. Raises InputError where another one was asked for."""
    units, count = (sum(getattr(t, what) for t in topologies.values()) for what in ("units", "count"))
    sparsity = 1 - count / units
    if asked is not None and round((1 - asked) * units) != count:
        raise InputError(
            f"sparsity {asked:g} was asked for, and what start gives has {sparsity:.6g}: leave sparsity out"
        )
    return sparsity


def _masked(
    model: nn.Module, masks: Mapping[str, Tensor], choice: Choice
) -> tuple[Choice, dict[str, nn.Module], dict[str, Tensor]]:
    """Every layer that has a mask, and no other."""
    if choice.include or choice.exclude:
        raise InputError("start: masks say which layers become sparse: leave out include and exclude")
    choice = replace(choice, sparsify_head=True)
    able = choice.candidates(model)
    places: dict[str, tuple[str, DensePlace]] = {}
    for module_name, module in able.items():
        places |= {name: (module_name, place) for name, place in dense_places({module_name: module}).items()}
    reasons = choice.reasons(model)
    active = {}
    for name, mask in masks.items():
        if name not in places:
            why = reasons.get(name) or f"the model's are such as {next(iter(places), 'none')}"
            raise InputError(f"start: {name} is no layer that can be sparse: {why}")
        place = places[name][1]
        described = KINDS.of(place.module)
        # The mask of a module's only layer is as its weight lies, any other's as the layer's matrix.
        if not place.part and mask.shape == getattr(place.module, place.weight).shape:
            mask = described.split(place.weight, mask.contiguous())[""]
        if mask.shape != place.shape:
            raise InputError(f"start: the mask of {name} has shape {tuple(mask.shape)}, not {tuple(place.shape)}")
        active[name] = mask.to(getattr(place.module, place.weight).device)
    targets = {name: module for name, module in able.items() if any(places[n][0] == name for n in active)}
    for name in dense_places(targets):
        if name not in active:
            raise InputError(f"start: there is no mask of {name}, which becomes sparse with others: give one for each")
    return replace(choice, include=tuple(map(escape, targets))), targets, active


def _topology(name: str, mask_OI: Tensor, unit: tuple[int, int], whole: bool) -> Topology:
    """Units with any active weight; whole: with nothing but active weights, or none."""
    (rows, columns), (b_out, b_in) = mask_OI.shape, unit
    if rows % b_out or columns % b_in:
        raise InputError(f"unit {b_out}x{b_in} does not divide layer {name} of {rows}x{columns}")
    blocks = mask_OI.reshape(rows // b_out, b_out, columns // b_in, b_in)
    active = blocks.any(dim=3).any(dim=1)
    if whole and not torch.equal(active, blocks.all(dim=3).all(dim=1)):
        raise InputError(f"start: the mask of {name} cuts through units of {b_out}x{b_in}: give one of whole units")
    indices = active.T.reshape(-1).nonzero().squeeze(1)
    if not indices.numel():
        raise InputError(f"start: no weight of layer {name} would exist: leave the layer out, or prune it less")
    return Topology((rows, columns), indices.to(index_dtype(grid_size((rows, columns), unit))), unit)


def _with_quota(name: str, mask_OI: Tensor, quota: Quota, whole: bool) -> Topology:
    """As many active weights of each group as the quota says; whole: just those of the mask."""
    groups = Groups.of_quota((mask_OI.shape[0], mask_OI.shape[1]), quota)
    counts = mask_OI.reshape(-1, quota.of).sum(1)
    wrong = counts != quota.active if whole else counts > quota.active
    if bool(wrong.any()):
        what = "active" if whole else "nonzero"
        raise InputError(
            f"start: {int(wrong.sum()):,} of {groups.count:,} groups of {quota.of} weights of layer {name} do not have "
            f"{quota.active} {what} ones: {'give a mask' if whole else 'prune the model'} by {quota}, or choose "
            "another unit"
        )
    return strongest(mask_OI.to(torch.float32), groups.count * quota.active, (1, 1), [groups])
