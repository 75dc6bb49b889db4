"""How inactive units are sampled: to be grown, or for a look at their gradients (`gse.py` has the formulas)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsae.core.drawing import sample_in_groups
from sparsae.core.groups import binding
from sparsae.core.host import on_device
from sparsae.core.observation import LayerView
from sparsae.core.ranks import ranks
from sparsae.core.topology import Topology
from sparsae.kernels.probe import Draw
from sparsae.rules.parts.grow import Growth


def sample_inactive(topologies: Mapping[str, Topology], ratio: float, rng: torch.Generator) -> dict[str, Tensor]:
    """gamma * count inactive units of each layer, uniformly without replacement."""
    return {
        name: topology.sample_inactive(min(round(ratio * topology.count), topology.units - topology.count), rng)
        for name, topology in topologies.items()
    }


def with_replacements(view: LayerView, dropped: Tensor, grown: Tensor, rng: torch.Generator) -> Growth:
    """The random units `grown` as candidates, and where groups have limits, others that could be grown in their place.

    For each of the units `dropped` there is one in the same group, unless it is full: no group has to lose anything.
    """
    units, first = [grown], grown.numel()
    for groups in binding(view.groups):
        taken = torch.cat([view.topology.indices, *units])
        units.append(sample_in_groups(groups, taken, groups.counts(dropped), rng).to(grown))
    candidates = torch.cat(units)
    if candidates.numel() == first:
        return Growth(grown, torch.ones(first, dtype=torch.float32, device=grown.device))
    # In random order, so that what has no room is random; those drawn without regard to groups before the others.
    scores = torch.rand(candidates.numel(), generator=rng, dtype=torch.float64, device="cpu")
    scores[:first] += 1
    return Growth(candidates, on_device(scores, grown.device))


def drawn(topologies: Mapping[str, Topology], ratio: float, sampling: str, rng: torch.Generator) -> dict[str, Draw]:
    """About gamma * count positions of each layer by GraBo or GraEst, to be drawn from its next backward pass."""
    seeds = torch.randint(2**62, (len(topologies),), generator=rng, device="cpu").tolist()
    return {
        name: _drawn(topology, round(ratio * topology.count), sampling, seed)
        for (name, topology), seed in zip(topologies.items(), seeds, strict=True)
    }


def _drawn(topology: Topology, n: int, sampling: str, seed: int) -> Draw:
    """Draws n pairs of an output and an input of the layer by GraBo or GraEst, less repeated and active ones."""
    score: Callable[[Tensor, Tensor], Tensor] = _bias if sampling == "grabo" else _estimate

    def draw(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        signs = _signs(x_TI.shape[0], rng).to(x_TI.device, x_TI.dtype) * 2 - 1
        rows, columns = (
            _draw_from(score(side, signs).view(-1, width).sum(1), n, rng)
            for side, width in ((dy_TO, topology.unit[0]), (x_TI, topology.unit[1]))
        )
        units = (columns * topology.grid[0] + rows).unique().to(topology.indices)
        return units[~topology.contains(units)]

    return draw


def _signs(tokens: int, rng: torch.Generator) -> Tensor:
    """(tokens,) of {0, 1}: of those that are drawn for the tokens of all ranks, the ones of this rank's."""
    here = ranks()
    counts = here.sums([tokens if rank == here.rank else 0 for rank in range(here.count)])
    signs = torch.randint(2, (sum(counts),), generator=rng, device="cpu")
    return signs[sum(counts[: here.rank]) :][:tokens]


def _bias(side_TF: Tensor, signs_T: Tensor) -> Tensor:
    """GraBo: sum_t |a_t| of each feature, over the tokens of all ranks."""
    return ranks().sum_(side_TF.abs().sum(0, dtype=torch.float32), "sampled gradients")


def _estimate(side_TF: Tensor, signs_T: Tensor) -> Tensor:
    """GraEst: |sum_t s_t a_t| of each feature, over the tokens of all ranks."""
    return ranks().sum_(signs_T @ side_TF, "sampled gradients").float().abs()


def _draw_from(weights: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n numbers of [0, len(weights)), with replacement, in proportion to the weights; evenly where all are zero."""
    ends = weights.double().cpu().cumsum(0)
    if not float(ends[-1]) > 0:
        return torch.randint(weights.numel(), (n,), generator=rng, device="cpu")
    at = torch.rand(n, generator=rng, dtype=torch.float64, device="cpu") * ends[-1]
    return torch.searchsorted(ends, at, right=True).clamp_(max=weights.numel() - 1)
