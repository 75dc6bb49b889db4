"""How many active units the layers of a Sparsifier may have, and with how many they end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsae.config.unit import Quota
from sparsae.core.budgets import density_bounds, density_factors
from sparsae.core.groups import Groups
from sparsae.core.heads import HeadLayout
from sparsae.core.schedule import CONSTANT, Schedule
from sparsae.errors import InputError, argument
from sparsae.nn.limits import Limits, is_rigid
from sparsae.nn.linear import SparseLinear
from sparsae.nn.sparsify import layer_counts
from sparsae.rules.parts.rule import Rule

if TYPE_CHECKING:
    from sparsae.config.sparsifier import SparsifierConfig

log = logging.getLogger(__name__)

Layers = Mapping[str, SparseLinear]


def layer_bounds(
    layers: Layers, config: SparsifierConfig, ends: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """(k_min, k_max) of each layer in units; one that starts outside its bounds widens them to where it is.

    ends: between what a schedule moves each layer, or a rule prunes it; there it may be.
    """
    topologies = {name: layer.topology for name, layer in layers.items()}
    density = sum(t.count for t in topologies.values()) / sum(t.units for t in topologies.values())
    low, high = _densities(config, density if config.sparsity is None else 1.0 - config.sparsity)
    bounds = {}
    for name, topology in topologies.items():
        if layers[name].quota is not None:
            bounds[name] = (1, topology.units)  # its groups say all
            continue
        k_min, k_max = density_bounds(topology.units, low, high)
        reached = topology.count, *ends.get(name, ())
        bounds[name] = (min(k_min, *reached), max(k_max, *reached))
    return bounds


def layer_ends(
    rule: Rule[Any], schedule: Schedule, layers: Layers, trained: Layers, config: SparsifierConfig
) -> dict[str, tuple[int, int]]:
    """Each trained layer's units now and at the end, of a rule that prunes; or between what the schedule moves it.

    Raises InputError where rule, schedule and `config.sparsity` do not fit, and where the model is sparser already than
    it shall be, or denser than a schedule begins; and as `refuse_shifting` does.
    """
    if quota := next((layer.quota for layer in layers.values() if layer.quota is not None), None):
        refuse_shifting(rule, quota, schedule)
    kind = config.schedule.kind
    what = f"rule '{rule.name}' prunes" if rule.prunes else f"schedule {kind} moves density"
    if rule.prunes and schedule.moves:
        raise InputError(f"rule '{rule.name}' prunes by a schedule of its own: leave out schedule {kind}")
    if not rule.prunes and not schedule.moves:
        if config.sparsity is not None:
            raise InputError(f"rule '{rule.name}' keeps the model's sparsity: leave out sparsity {config.sparsity:g}")
        if config.density:
            raise InputError(f"rule '{rule.name}' keeps the layers' densities: give density to sparsify() alone")
        return {}
    if config.sparsity is None:
        raise InputError(f"{what}: set the sparsity where it ends")
    shapes, unit = {name: layer.shape for name, layer in trained.items()}, next(iter(trained.values())).unit
    now = {name: layer.topology.count for name, layer in trained.items()}
    end = round((1.0 - config.sparsity) * sum(layer.topology.units for layer in trained.values()))
    # As few as it ever shall have is no error: so a run begins that is resumed after its last pruning.
    if sum(now.values()) < (end if kind != "restore" else round(schedule.factor * end) - len(now)):
        raise InputError(f"{what} to sparsity {config.sparsity:g}: the model is sparser already")
    first = config.schedule.first_factor
    if schedule.moves and sum(now.values()) > first * end + len(now):
        raise InputError(
            f"schedule {kind} begins at {first:g} times the density of sparsity {config.sparsity:g}: the model is "
            f"denser (sparsify it to {max(0.0, 1.0 - first * (1.0 - config.sparsity)):g})"
        )
    densities = _densities(config, 1.0 - config.sparsity)
    factors = density_factors(config.density, list(layers))
    at_most = None if kind == "restore" else now
    last = layer_counts(shapes, config.sparsity, config.budget, unit, densities, factors, at_most)
    return schedule.ends(now, last) if schedule.moves else {name: (now[name], last[name]) for name in trained}


def refuse_shifting(rule: Rule[Any], quota: Quota, schedule: Schedule = CONSTANT) -> None:
    """Raise InputError for a rule or a schedule that changes the density of layers, which a quota fixes."""
    what = None
    if rule.prunes:
        what = f"rule '{rule.name}' prunes"
    elif schedule.moves:
        what = "a density schedule moves density"
    elif rule.shifts is not None:
        what = f"rule '{rule.name}' moves density between layers ({rule.shifts})"
    if what is not None:
        raise InputError(f"{what}, and with {argument('unit')} {quota} every layer has density {quota.density:.4g}")


def layer_groups(
    layers: Layers,
    config: SparsifierConfig,
    heads: Mapping[str, HeadLayout],
    densities: Mapping[str, float],
    ends: Mapping[str, tuple[int, int]],
) -> dict[str, tuple[Groups, ...]]:
    """Heads and neurons that have limits, of each layer: by its first density, and so that they hold to its last.

    Raises InputError as `Limits.groups` does.
    """
    found = {}
    for name, layer in layers.items():
        limits = Limits(config.head_min_density, config.fan_in, config.fan_out, layer.quota)
        shape, unit = layer.topology.shape, layer.topology.unit
        first = round(densities[name] * layer.topology.units)
        limits.groups(shape, unit, min([first, *ends.get(name, ())]), heads.get(name))
        found[name] = limits.groups(shape, unit, first, heads.get(name))
    return found


def tell_if_rigid(rule: Rule[Any], groups: Mapping[str, tuple[Groups, ...]]) -> None:
    """Log that limits on neurons leave connections no way to move, under a rule that moves them."""
    if rule.moves and not rule.prunes and (rigid := [name for name, mine in groups.items() if is_rigid(mine)]):
        log.warning(
            "fan_in and fan_out fix the connections of every neuron and of every input in %d layers, such as %s, "
            "where none can move then: widen one of them",
            len(rigid),
            rigid[0],
        )


def whole_heads(layers: Layers, heads: Mapping[str, HeadLayout]) -> dict[str, HeadLayout]:
    """The layouts of those layers whose blocks do not cross two heads, which then could not be told apart."""
    whole = {}
    for name, layout in heads.items():
        b_out, b_in = layers[name].unit
        if layout.size % (b_out if layout.axis == "out" else b_in) == 0:
            whole[name] = layout
    return whole


def _densities(config: SparsifierConfig, density: float) -> tuple[float, float]:
    """(k_min, k_max) as densities, for a model of that density."""
    low = density / 4 if config.min_density is None else config.min_density
    high = min(1.0, 4 * density) if config.max_density is None else config.max_density
    return low, high
