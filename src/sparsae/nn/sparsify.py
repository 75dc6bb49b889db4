"""A model's layers into sparse ones, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from sparsae.config.density import DensityFactors
from sparsae.config.section import TOLERANCE
from sparsae.config.unit import Quota, parsed_unit
from sparsae.core.budgets import (
    allocate,
    density_bounds,
    density_factors,
    matrix_shape,
    relative_density,
)
from sparsae.core.drawing import random_topology
from sparsae.core.heads import HeadLayout
from sparsae.core.randomness import generator
from sparsae.core.topology import grid_size
from sparsae.errors import InputError, argument
from sparsae.nn.arguments import require_arguments
from sparsae.nn.carry import carry_module, hand_over_hooks, own_names, without_hooks
from sparsae.nn.choice import Choice, is_patched, layer_shapes
from sparsae.nn.conversion import (
    Initializer,
    Maker,
    dense_matrices,
    dense_twin,
    sparse_modules,
    sparse_twin,
    to_dense,
    to_sparse,
)
from sparsae.nn.dense import strongest
from sparsae.nn.limits import Limits, require_quota
from sparsae.nn.mlp import FusedMLP, recognized
from sparsae.nn.start import Start, given_topologies, require_sparsity
from sparsae.nn.summary import forget, note
from sparsae.optimizer_state import Successor, succession

log = logging.getLogger(__name__)


def sparsify(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    start: Start = "random",
    budget: str = "erk",
    unit: tuple[int, int] | str = (1, 1),
    min_density: float = 0.0,
    max_density: float = 1.0,
    density: DensityFactors | None = None,
    fan_in: tuple[float, float] | None = None,
    fan_out: tuple[float, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sparsify_head: bool = False,
    heads: Mapping[str, HeadLayout] | None = None,
    head_min_density: float = 0.0,
    initializer: Initializer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> nn.Module:
    """Replace the layers of `model`, in place, by sparse ones; returns the model.

    Every kind of layer that nn/kinds knows is replaced; what stays dense, `summary(model)` tells with the reasons:
    embeddings, norms, tied weights, routers and (unless `sparsify_head`) output heads among others. `include` /
    `exclude` are globs over module names. Exactly round((1 - sparsity) * units) units of `unit` = (b_out, b_in)
    weights are active over the whole model (sparsity: 0.9, where none is given), shared out by `budget` ("uniform",
    "er", "erk") with every layer's density inside [min_density, max_density], and every head of a layer that `heads`
    describes at least at head_min_density. `density` multiplies what the budget gives: by globs over layer names
    `{"*.mlp.*": 0.8}`, and from the first block to the last `{"depth": [1.5, 1.0, 0.5]}`; the total stays, and a layer
    that stands at a bound is told of in the log. `fan_in` and `fan_out` are the least and the most active units of a
    row and of a column of a layer's grid, in terms of their mean there, rounded outward: with (1, 1) all neurons of a
    layer have as many inputs, to within one.
    unit "2:4" (N:M): of every M consecutive inputs of a row exactly N weights are active. So every layer, which has to
    be linear, has the density N / M, whatever the budget; another sparsity, shares, fans and floors are errors.
    start: which units these are. "random"; "magnitude": those with the largest weights of each layer (the first of
    equal ones); "nonzero": those with a weight that is not zero, in the layers that have a zero; masks: bool tensors by
    the names of layers, of the shapes of their weights, in the layers that have one, heads included. The last two bring
    every layer's density along: another sparsity beside them is an error, and so is a share.
    Active positions keep the values of the dense weight; `initializer` draws new ones instead (it must be given for a
    layer on the meta device, whose dense weight never exists). Layers keep their mode, hooks and attributes, and what
    was frozen is.

    optimizer: the one that trains the model already, between two of its steps. The new parameters get the places of the
    old ones in its groups, and what it keeps for each weight is kept for those that stay.

    Raises InputError for arguments of other types, a sparsity outside [0, 1) or other than N:M has, a unit that does
    not divide a layer, a convolution by N:M,
    patterns, factors and heads that match nothing, bounds that cannot hold the budget, hooks on the gradient of a
    weight, and an optimizer whose state cannot follow; then nothing has changed.
    """
    require_arguments(**locals())  # which have no other name yet
    unit, quota = parsed_unit(unit)
    if optimizer is not None and initializer is not None:
        raise InputError("an initializer draws new values, to which nothing of the optimizer's belongs: leave out one")
    _refuse_synchronized(model)
    choice = Choice(0.9 if sparsity is None else float(sparsity), tuple(include), tuple(exclude), sparsify_head)
    cut: list[str] = []
    if start != "random" and start != "magnitude":
        shares: dict[str, object] = {
            "budget": budget != "erk",
            "min_density": min_density > 0,
            "max_density": max_density < 1,
        }
        shares |= {"density": density, "fan_in": fan_in, "fan_out": fan_out, "heads": heads}
        shares |= {"head_min_density": head_min_density}
        if given := [name for name, is_given in shares.items() if is_given]:
            raise InputError(f"start brings every layer's density along: leave out {', '.join(given)}")
        choice, targets, topologies = given_topologies(model, start, choice, unit, quota)
        choice = replace(choice, sparsity=require_sparsity(sparsity, topologies))
    else:
        targets = choice.layers(model)
        shapes = layer_shapes(targets)
        if quota is not None:
            choice, budget = replace(choice, sparsity=_sparsity_of(quota, sparsity, density)), "uniform"
            require_quota(shapes, quota)
        validated_heads(heads, head_min_density, shapes)
        limits = Limits(head_min_density, fan_in, fan_out, quota)
        densities = (min_density, max_density)
        factors = density_factors(density or {}, list(shapes))
        counts = layer_counts(shapes, choice.sparsity, budget, unit, densities, factors)
        cut = cut_short(shapes, choice.sparsity, budget, unit, densities, factors)
        choice = replace(choice, factors=factors)
        sides = {name: matrix_shape(shape) for name, shape in shapes.items()}
        groups = {n: limits.require_room(sides[n], unit, counts[n], (heads or {}).get(n)) for n in shapes}
        if start == "random":
            topologies = {
                name: random_topology(shape, unit, counts[name], groups[name], generator(seed, "topology", name))
                for name, shape in sides.items()
            }
        else:
            topologies = {
                name: strongest(matrix_OI, counts[name], unit, groups[name])
                for name, matrix_OI in dense_matrices(targets).items()
            }
    if "" in targets:
        raise InputError("the model is itself a layer: put it into an nn.Sequential")
    # All topologies first: a layer that cannot be made sparse leaves the model as it was.
    make = Maker(topologies, initializer, backend, seed, quota)
    twins = {name: sparse_twin(name, module, make) for name, module in targets.items()}
    succeed = _succession(
        optimizer, {k: s for name, twin in twins.items() for k, s in to_sparse(name, targets[name], twin)}
    )
    put_in_place(model, targets, twins)
    succeed()
    note(model, choice)
    if cut:
        name = cut[0]
        log.warning(
            "density: min_density and max_density cut factors short in %d layers, such as %s, which has density %.4g",
            len(cut),
            name,
            topologies[name].density,
        )
    return model


def _sparsity_of(quota: Quota, asked: float | None, density: DensityFactors | None) -> float:
    """Raises InputError where another sparsity was asked for, or other densities of some layers."""
    if asked is not None and abs(asked - quota.sparsity) > TOLERANCE:
        raise InputError(
            f"unit {quota} has sparsity {quota.sparsity:.6g}, not {asked:g}: set that, or leave sparsity out"
        )
    if density:
        raise InputError(f"unit {quota} gives every layer one density: leave out density")
    return quota.sparsity


def densify(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Replace the sparse layers of `model`, in place, by dense ones with the same function; returns the model.

    optimizer: as `sparsify` has it; for inactive positions it begins with zeros.

    Raises InputError where a layer's values have a hook on their gradient, and for an optimizer whose state cannot
    follow; then nothing has changed.
    """
    require_arguments(model=model, optimizer=optimizer)
    _refuse_synchronized(model)
    sparse = sparse_modules(model)
    twins = {name: dense_twin(name, module) for name, module in sparse.items()}
    succeed = _succession(
        optimizer, {k: s for name, twin in twins.items() for k, s in to_dense(name, sparse[name], twin)}
    )
    _replace(model, [(module, twins[name]) for name, module in sparse.items()])
    succeed()
    fused = [module for module in model.modules() if isinstance(module, FusedMLP)]
    _replace(model, [(module, _unfused(module)) for module in fused])
    forget(model)
    return model


def put_in_place(model: nn.Module, targets: Mapping[str, nn.Module], twins: Mapping[str, nn.Module]) -> None:
    """The sparse twins of dense modules, by the same names, into the model; MLPs of sparse layers are fused."""
    _replace(model, [(module, twins[name]) for name, module in targets.items()])
    mlps = [
        module
        for name, module in model.named_modules()
        if recognized(module) and not is_patched(module) and not name.endswith("_orig_mod")
    ]
    _replace(model, [(module, _fused(module)) for module in mlps])


def validated_heads(
    heads: Mapping[str, HeadLayout] | None, head_min_density: float, layers: Collection[str]
) -> Mapping[str, HeadLayout]:
    """The layouts. Raises InputError for one of a layer that is not sparse, and for a floor of heads without any."""
    for name in heads or {}:
        if name not in layers:
            some = ", ".join([*list(layers)[:3], *(["..."] if len(layers) > 3 else [])])
            raise InputError(f"heads: '{name}' is no sparse layer of the model, which are {some}")
    if head_min_density and not heads:
        raise InputError(f"head_min_density {head_min_density:g} needs heads, the layouts of attention layers by name")
    return heads or {}


def layer_counts(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    budget: str,
    unit: tuple[int, int],
    densities: tuple[float, float],
    factors: Mapping[str, float],
    at_most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Active units of each layer, exactly round((1 - sparsity) * units) in all.

    shapes: (out, in, kernel dimensions...) of each. densities: bounds of every layer's; factors: of what the budget
    gives each. No layer gets more than `at_most`; where that and the upper bounds leave no room together, these give
    way.

    Raises InputError where the unit does not divide a layer or the bounds cannot hold the budget.
    """
    sides = {name: matrix_shape(shape) for name, shape in shapes.items()}
    for name, (rows, columns) in sides.items():
        if rows % unit[0] or columns % unit[1]:
            raise InputError(
                f"{argument('unit')} {unit[0]}x{unit[1]} does not divide layer {name} of {rows}x{columns}: "
                f"choose one that does, or leave the layer out with {argument('exclude')}"
            )
    units = [grid_size(shape, unit) for shape in sides.values()]
    k = round((1.0 - sparsity) * sum(units))
    if k < len(units):
        raise InputError(
            f"sparsity {sparsity:g} leaves {k} of {sum(units)} units for {len(units)} layers, which need one each: "
            f"lower {argument('sparsity')} or choose a smaller {argument('unit')}"
        )
    bounds = [density_bounds(n, *densities) for n in units]
    if at_most is not None:
        limits = [min(high, at_most[name]) for name, (_, high) in zip(shapes, bounds, strict=True)]
        if sum(limits) < k:
            limits = [at_most[name] for name in shapes]
        bounds = [(min(low, limit), limit) for (low, _), limit in zip(bounds, limits, strict=True)]
    relative = [relative_density(budget, shape) * factors[name] for name, shape in shapes.items()]
    return dict(zip(shapes, allocate(relative, bounds, units, k), strict=True))


def cut_short(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    budget: str,
    unit: tuple[int, int],
    densities: tuple[float, float],
    factors: Mapping[str, float],
) -> list[str]:
    """The layers that stand at a bound of their density (or at 1) only because of the factors."""
    if all(factor == 1.0 for factor in factors.values()):
        return []
    bounds = {name: density_bounds(grid_size(matrix_shape(shape), unit), *densities) for name, shape in shapes.items()}
    counts = layer_counts(shapes, sparsity, budget, unit, densities, factors)
    plain = layer_counts(shapes, sparsity, budget, unit, densities, dict.fromkeys(shapes, 1.0))
    return [name for name in shapes if counts[name] in bounds[name] and plain[name] not in bounds[name]]


def _succession(optimizer: torch.optim.Optimizer | None, successors: Mapping[str, Successor]) -> Callable[[], None]:
    return (lambda: None) if optimizer is None else succession(optimizer, successors)


def _fused(module: nn.Module) -> FusedMLP:
    """What takes the place of an MLP. The hooks move: the MLP is still called inside, where it cannot fuse."""
    fused = FusedMLP(module)
    carry_module("", module, fused, frozenset(module._modules))
    without_hooks(module)
    return fused


def _unfused(fused: FusedMLP) -> nn.Module:
    original = fused.original
    carry_module("", fused, original, own_names(FusedMLP(original)))
    return original


def _refuse_synchronized(model: nn.Module) -> None:
    # It averages the gradients of the parameters that it was made with, and would leave out all new ones.
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise InputError(
            "a DistributedDataParallel knows the parameters that it was made with: convert the model first"
        )


def _replace(model: nn.Module, twins: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Each old module by its new one, under every name that it has, in one walk through the model."""
    new_of = {id(old): new for old, new in twins}
    # A linear layer may have one inside, which its twin has too.
    for parent in [*model.modules(), *new_of.values()]:
        # named_children would give a module with two names only once.
        for name, child in list(parent._modules.items()):
            if (new := new_of.get(id(child))) is not None:
                setattr(parent, name, new)
    for old, new in twins:
        hand_over_hooks(old, new)
