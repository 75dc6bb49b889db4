"""Mutation operators: each makes one swap from an observation.

`count` is the number of units to drop and to grow over the whole model, k * p_mutate. Guided ones choose inside the
limits of groups; what a random one proposes may leave them, and the bounds of layers: the strategy sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsae.core.drawing import random_topology
from sparsae.core.host import on_device
from sparsae.core.observation import Observation, unit_magnitude
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology, sample_distinct
from sparsae.rules.parts.choose import in_layer
from sparsae.rules.parts.grow import Growth, largest_gradients, sample_of, tempered, with_random

if TYPE_CHECKING:
    from sparsae.rules.evolution import ResetConfig


@dataclass(frozen=True)
class Guidance:
    """How guided proposals choose.

    drop, grow: temperatures, of Gumbel noise on 2 log|w| of what is dropped and on 2 log|g| of what is grown; 0: none.
    random: the share of what is grown that is uniformly random.
    """

    drop: float = 0.0
    grow: float = 0.0
    random: float = 0.0


Proposer = Callable[[Observation, int, Guidance, torch.Generator], Swap]


def uniform(observation: Observation, count: int, guidance: Guidance, rng: torch.Generator) -> Swap:
    """Drops `count` active units of the whole model, grows `count` inactive ones, all uniformly."""
    topologies = observation.topologies
    inactive = {name: topology.units - topology.count for name, topology in topologies.items()}
    count = min(count, sum(inactive.values()))
    active = {name: topology.count for name, topology in topologies.items()}
    drop = _ranks_by_layer(sample_distinct(sum(active.values()), count, rng), active)
    grow = _ranks_by_layer(sample_distinct(sum(inactive.values()), count, rng), inactive)
    return Swap(
        {name: _at(topologies[name], ranks) for name, ranks in drop.items()},
        {name: topologies[name].inactive_at(ranks) for name, ranks in grow.items()},
    )


def layerwise(observation: Observation, count: int, guidance: Guidance, rng: torch.Generator) -> Swap:
    """Uniform within each layer, whose number of active units stays."""
    drop, grow = {}, {}
    for name, n in shares(observation.topologies, count).items():
        topology = observation.layers[name].topology
        drop[name] = _at(topology, sample_distinct(topology.count, n, rng))
        grow[name] = topology.sample_inactive(n, rng)
    return Swap(drop, grow)


def guided(observation: Observation, count: int, guidance: Guidance, rng: torch.Generator) -> Swap:
    """Per layer: drops small weights, with tempered chance, grows the largest gradients of a sample of inactive units.

    Drop: the n smallest of 2 log|w| + tau_d G; grow: the n largest of 2 log|g| + tau_g G among the sampled units,
    with G standard Gumbel noise. So the kept units are a draw without replacement with odds |w|^(2 / tau_d), the grown
    ones with odds |g|^(2 / tau_g) (Gumbel top-k: Kool et al., 2019); at temperature 0 the extremes are taken.
    """
    drop, grow = {}, {}
    for name, n in shares(observation.topologies, count).items():
        view = observation.layers[name]
        n = min(n, sample_of(view).numel())
        weakest = tempered(unit_magnitude(view.values), guidance.drop, rng)
        growth = largest_gradients(view)
        growth = Growth(growth.units, tempered(growth.scores, guidance.grow, rng))
        growth = with_random(view, growth, round(guidance.random * n), rng)
        drop[name], grow[name] = in_layer(view, weakest, n, growth)
    return Swap(drop, grow)


def shift(observation: Observation, count: int, guidance: Guidance, rng: torch.Generator) -> Swap:
    """Density moves between layers: those that lose and those that gain are weighted at random (Dirichlet)."""
    views = observation.layers
    drops = _random_split(count, {name: view.topology.count for name, view in views.items()}, rng)
    grows = _random_split(sum(drops.values()), {n: v.topology.units - v.topology.count for n, v in views.items()}, rng)
    missing = sum(drops.values()) - sum(grows.values())
    for name in drops:
        back = min(drops[name], missing)
        drops[name] -= back
        missing -= back
    return Swap(
        {
            name: _at(views[name].topology, sample_distinct(views[name].topology.count, n, rng))
            for name, n in drops.items()
        },
        {name: views[name].topology.sample_inactive(n, rng) for name, n in grows.items()},
    )


def reset(observation: Observation, config: ResetConfig, rng: torch.Generator) -> tuple[str, Swap]:
    """A large jump: a reshuffle of 5-10 % of each layer, or a new Erdos-Renyi topology with the layers' counts."""
    if float(torch.rand((), generator=rng, dtype=torch.float32, device="cpu")) >= config.redraw:
        low, high = config.reshuffle
        share = low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float32, device="cpu"))
        return "reshuffle", layerwise(observation, round(share * observation.count), Guidance(), rng)
    drop, grow = {}, {}
    for name, view in observation.layers.items():
        now = view.topology
        new = random_topology(now.shape, now.unit, now.count, view.groups, rng).to(now.indices.device)
        drop[name] = now.indices[~new.contains(now.indices)]
        grow[name] = new.indices[~now.contains(new.indices)]
    return "redraw", Swap(drop, grow)


def rigl(observation: Observation, count: int, guidance: Guidance, rng: torch.Generator) -> Swap:
    """Per layer: drops small weights, with tempered chance, grows where the gradient of all its units is largest.

    What is dropped is among what may be grown, as in RigL (rigl.py); candidates of one update differ in what they drop
    only.
    """
    drop, grow = {}, {}
    for name, n in shares(observation.topologies, count).items():
        view = observation.layers[name]
        weakest = tempered(unit_magnitude(view.values), guidance.drop, rng)
        growth = with_random(view, largest_gradients(view), round(guidance.random * n), rng)
        drop[name], grow[name] = in_layer(view, weakest, n, growth)
    return Swap(drop, grow)


PROPOSERS: dict[str, Proposer] = {
    "uniform": uniform,
    "layerwise": layerwise,
    "guided": guided,
    "shift": shift,
    "rigl": rigl,
}


def shares(topologies: Mapping[str, Topology], count: int) -> dict[str, int]:
    """`count` over the layers in proportion to their active units, by cumulative rounding; at most what is inactive."""
    total, before, split = sum(topology.count for topology in topologies.values()), 0, {}
    for name, topology in topologies.items():
        after = before + topology.count
        n = round(count * after / total) - round(count * before / total)
        split[name] = min(n, topology.count, topology.units - topology.count)
        before = after
    return {name: n for name, n in split.items() if n}


def _at(topology: Topology, positions: Tensor) -> Tensor:
    return topology.indices[on_device(positions, topology.indices.device)]


def _ranks_by_layer(ranks: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Sorted ranks over all layers end to end, as ranks within each layer."""
    ends = torch.tensor(list(sizes.values()), dtype=torch.int64, device="cpu").cumsum(0)
    cuts = torch.searchsorted(ranks, ends)
    split, start, offset = {}, 0, 0
    for name, cut, end in zip(sizes, cuts.tolist(), ends.tolist(), strict=True):
        if cut > start:
            split[name] = ranks[start:cut] - offset
        start, offset = cut, end
    return split


def _random_split(count: int, sizes: Mapping[str, int], rng: torch.Generator) -> dict[str, int]:
    """`count` over layers by flat Dirichlet weights times their size, none above its size."""
    weights = -torch.log(torch.rand(len(sizes), generator=rng, dtype=torch.float64, device="cpu").clamp_(min=1e-300))
    weights *= torch.tensor(list(sizes.values()), dtype=torch.float64, device="cpu")
    shares = (count * weights / weights.sum().clamp(min=1e-300)).floor().long().tolist()
    split = {name: min(share, size) for (name, size), share in zip(sizes.items(), shares, strict=True)}
    left = count - sum(split.values())
    for name, size in sizes.items():
        more = min(left, size - split[name])
        split[name] += more
        left -= more
    return split
