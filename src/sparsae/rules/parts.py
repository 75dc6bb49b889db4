"""What rules are made of: how many units move, which go, which come, and whether the bounds hold.

Each rule's own file puts these together as its paper does. All choices among equals go to the first, in the order of
layers and units, so that no two runs differ in them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsae.core.ranking import largest, smallest
from sparsae.core.schedules import decayed
from sparsae.core.topology import Topology
from sparsae.rules.base import Candidate, LayerView, Observation, unit_magnitude
from sparsae.surgery import Swap


def cosine_fraction(first: float, progress: float, stop: float) -> float:
    """f = alpha / 2 (1 + cos(pi t / T_end)) (Evci et al., 2020), T_end being the share `stop` of the run; then 0."""
    return first * decayed("cosine", min(1.0, progress / stop))


def sample_inactive(topologies: Mapping[str, Topology], ratio: float, rng: torch.Generator) -> dict[str, Tensor]:
    """gamma * count inactive units of each layer, uniformly without replacement."""
    return {
        name: topology.sample_inactive(min(round(ratio * topology.count), topology.units - topology.count), rng)
        for name, topology in topologies.items()
    }


def exchange(view: LayerView, gone: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n units with the largest gradients come, of those that are inactive once the units at positions `gone` went.

    A unit of `gone` that is among them never left: it keeps its value and its moments. So (units to drop, units to
    grow) have none in common. Needs a dense gradient with at least n inactive units, or all that there are.
    """
    if not gone.numel():
        return view.topology.indices[:0], view.topology.indices[:0]
    assert view.sample is not None
    assert view.sample_gradient is not None
    assert view.active_gradient is not None
    leaving = view.topology.indices[gone]
    units = torch.cat([leaving, view.sample.to(leaving)])
    gradients = torch.cat([unit_magnitude(view.active_gradient)[gone], unit_magnitude(view.sample_gradient)])
    units, order = units.sort()
    chosen = order[largest(gradients[order], n)]
    returned = torch.zeros(leaving.numel(), dtype=torch.bool, device=leaving.device)
    returned[chosen[chosen < leaving.numel()]] = True
    return leaving[~returned], view.sample[chosen[chosen >= leaving.numel()] - leaving.numel()]


def smallest_overall(
    scores: Mapping[str, Tensor], n: int, least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, Tensor]:
    """Positions of the n smallest scores of all layers together, at least `least` and at most `most` in each layer.

    Raises ValueError where that does not leave n.
    """
    if not sum(least.values()) <= n <= sum(most.values()):
        raise ValueError(f"{n} scores are not between {sum(least.values())} and {sum(most.values())}")
    chosen, between = {}, {}
    for name, layer in scores.items():
        chosen[name] = torch.zeros(layer.numel(), dtype=torch.bool, device=layer.device)
        chosen[name][smallest(layer, least[name])] = True
        allowed = smallest(layer, most[name])
        between[name] = allowed[~chosen[name][allowed]]
    # Those that must go and those that may not take no part, so no score can be taken for theirs.
    open_scores = torch.cat([layer[between[name]] for name, layer in scores.items()])
    goes = torch.zeros(open_scores.numel(), dtype=torch.bool, device=open_scores.device)
    goes[smallest(open_scores, n - sum(least.values()))] = True
    for part, (name, positions) in zip(goes.split([p.numel() for p in between.values()]), between.items(), strict=True):
        chosen[name][positions[part]] = True
    return {name: layer.nonzero().squeeze(1) for name, layer in chosen.items()}


def largest_sampled(views: Mapping[str, LayerView], n: int, most: Mapping[str, int]) -> dict[str, Tensor]:
    """The n sampled units with the largest gradients of all layers together, at most `most` in each layer."""
    scores = {}
    for name, view in views.items():
        assert view.sample_gradient is not None
        scores[name] = -unit_magnitude(view.sample_gradient)
    chosen = smallest_overall(scores, n, dict.fromkeys(views, 0), most)
    return {name: sample_of(view)[chosen[name].to(sample_of(view).device)] for name, view in views.items()}


def sample_of(view: LayerView) -> Tensor:
    """The sampled units of a layer, of a rule that takes a sample."""
    assert view.sample is not None
    return view.sample


def pruned_counts(observation: Observation, left: float, scope: str) -> dict[str, int]:
    """How many of its smallest weights each layer loses, on the way from its first to its last number of units.

    left: share of that way that remains. "local": each layer has k_end + left (k_start - k_end) units afterwards.
    "global": the model has, whichever its smallest weights are, and every layer keeps its k_min.
    """
    views = observation.layers
    goals = {name: shrunk(*_ends(view), left) for name, view in views.items()}
    if scope == "local":
        return {name: max(0, view.topology.count - goals[name]) for name, view in views.items()}
    starts, ends = (sum(_ends(view)[i] for view in views.values()) for i in (0, 1))
    surplus = max(0, observation.count - shrunk(starts, ends, left))
    room = {name: max(0, view.topology.count - view.bounds[0]) for name, view in views.items()}
    magnitudes = {name: view.magnitude for name, view in views.items()}
    positions = smallest_overall(magnitudes, surplus, dict.fromkeys(views, 0), room)
    return {name: at.numel() for name, at in positions.items()}


def shrunk(start: int, end: int, left: float) -> int:
    """Units of a model, or of a layer, `left` of whose way from `start` to `end` remains."""
    return end + round(left * (start - end))


def _ends(view: LayerView) -> tuple[int, int]:
    assert view.ends is not None
    return view.ends


def candidate(observation: Observation, name: str, drop: Mapping[str, Tensor], grow: Mapping[str, Tensor]) -> Candidate:
    """A rule's one candidate, out of the race where it leaves a layer's bounds or a head's floor."""
    drop, grow = ({layer: u for layer, u in units.items() if u.numel()} for units in (drop, grow))
    shrinks = sum(u.numel() for u in drop.values()) - sum(u.numel() for u in grow.values())
    swap = Swap(drop, grow, shrinks)
    return Candidate(swap, name, None if keeps_bounds(observation.layers, swap) else "bounds")


def keeps_bounds(views: Mapping[str, LayerView], swap: Swap) -> bool:
    """Whether every touched layer stays inside its bounds and above its heads' floors after a swap."""
    for name, change in swap.count_changes().items():
        view, empty = views[name], views[name].topology.indices[:0]
        if not view.holds(view.topology.count + change):
            return False
        # Counts are known without the new topology, which takes as long as a candidate's layer to make.
        if view.head_floor and not view.keeps_floor(
            view.topology.replace(swap.drop.get(name, empty), swap.grow.get(name, empty))[0]
        ):
            return False
    return True
