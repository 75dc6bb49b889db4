"""GSE: guided stochastic exploration (Heddes et al., 2024).

With k = floor(f_t nnz) and f_t = alpha / 2 (1 + cos(pi t / T_end)), over the model ("global") or each layer ("local"):

    S: about gamma nnz_l inactive positions of each layer l, drawn at random
    grow: the k positions of S with the largest |dL/dW|, computed there and nowhere else; they start at zero
    drop: the k smallest |w| of what was active before; what has just grown is protected

An input i and an output j are drawn independently, with probabilities p_i and q_j; X is (tokens, in), dY (tokens, out):

    uniform    p and q are even
    GraBo      p_i ~ sum_t |X_ti|,      q_j ~ sum_t |dY_tj|
    GraEst     p_i ~ |sum_t s_t X_ti|,  q_j ~ |sum_t s_t dY_tj|,    s_t = +1 or -1 at random

GraBo draws by a bound: |dL/dW_ji| <= sum_t |dY_tj| |X_ti|. GraEst draws by an estimate: the product of its two sums has
the mean dL/dW_ji. Pairs are drawn with replacement, from the batch of the first backward pass before the update;
repeated and active ones are discarded. "uniform" draws min(gamma nnz_l, inactive) distinct inactive positions instead.
Time and memory of a layer are O(tokens (in + out + nnz)), up to logarithms; nothing has its dense weight's size.

The reference code simulates with masks: it computes dense gradients, on batches of their own, and looks at every
position of a layer that is at least half dense. It knows no bounds on layers; here layers keep theirs, and where the
global ranking would break them, the next smallest weights of other layers go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsae.config.topology import GseConfig
from sparsae.core.ranking import largest, smallest
from sparsae.core.schedules import is_periodic
from sparsae.core.topology import Topology
from sparsae.kernels.probe import Draw
from sparsae.rules.base import Candidate, LayerView, NoState, Observation, Rule, unit_magnitude
from sparsae.rules.parts import (
    candidate,
    cosine_fraction,
    largest_sampled,
    sample_inactive,
    sample_of,
    smallest_overall,
)


class Gse(Rule[NoState]):
    """Grow the largest gradients of a sample, then drop the smallest weights."""

    needs = frozenset({"gradient_at"})

    def __init__(self, config: GseConfig) -> None:
        self.config = config

    def initial_state(self) -> NoState:
        return NoState()

    def due(self, step: int, steps: int) -> bool:
        return is_periodic(step, steps, self.config.every, self.config.stop)

    def sample(
        self, topologies: Mapping[str, Topology], state: NoState, rng: torch.Generator
    ) -> Mapping[str, Tensor | Draw]:
        if self.config.sampling == "uniform":
            return sample_inactive(topologies, self.config.sample_ratio, rng)
        seeds = torch.randint(2**62, (len(topologies),), generator=rng, device="cpu").tolist()
        return {
            name: _drawn(topology, round(self.config.sample_ratio * topology.count), self.config.sampling, seed)
            for (name, topology), seed in zip(topologies.items(), seeds, strict=True)
        }

    def probed_units(self, active: int, inactive: int) -> int:
        return min(round(self.config.sample_ratio * active), inactive)

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        fraction = self.drop_fraction(observation.progress)
        move = _move_globally if self.config.scope == "global" else _move_locally
        return [candidate(observation, "gse", *move(observation.layers, fraction))]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {"drop_fraction": self.drop_fraction(progress)}

    def drop_fraction(self, progress: float) -> float:
        """f in force."""
        return cosine_fraction(self.config.drop_fraction, progress, self.config.stop)


def _move_locally(views: Mapping[str, LayerView], fraction: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    drop, grow = {}, {}
    for name, view in views.items():
        assert view.sample_gradient is not None
        sample = sample_of(view)
        n = min(int(fraction * view.topology.count), sample.numel())
        grow[name] = sample[largest(unit_magnitude(view.sample_gradient), n).to(sample.device)]
        drop[name] = view.topology.indices[smallest(view.magnitude, n)]
    return drop, grow


def _move_globally(views: Mapping[str, LayerView], fraction: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    counts = {name: view.topology.count for name, view in views.items()}
    # No more grows in a layer than it has, so that the layers together can always lose as much within their bounds.
    room = {name: min(sample_of(view).numel(), counts[name]) for name, view in views.items()}
    n = min(int(fraction * sum(counts.values())), sum(room.values()))
    grow = largest_sampled(views, n, room)
    least, most = {}, {}
    for name, view in views.items():
        k_min, k_max = view.bounds
        least[name] = max(0, counts[name] + grow[name].numel() - k_max)
        most[name] = min(counts[name], counts[name] + grow[name].numel() - k_min)
    positions = smallest_overall({name: view.magnitude for name, view in views.items()}, n, least, most)
    return {name: view.topology.indices[positions[name]] for name, view in views.items()}, grow


def _drawn(topology: Topology, n: int, sampling: str, seed: int) -> Draw:
    """Draws n pairs of an output and an input of the layer by GraBo or GraEst, less repeated and active ones."""
    score: Callable[[Tensor, Tensor], Tensor] = _bias if sampling == "grabo" else _estimate

    def draw(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (x_TI.shape[0],), generator=rng, device="cpu").to(x_TI.device, x_TI.dtype) * 2 - 1
        rows, columns = (
            _draw_from(score(side, signs).view(-1, width).sum(1), n, rng)
            for side, width in ((dy_TO, topology.unit[0]), (x_TI, topology.unit[1]))
        )
        units = (columns * topology.grid[0] + rows).unique().to(topology.indices)
        return units[~topology.contains(units)]

    return draw


def _bias(side_TF: Tensor, signs_T: Tensor) -> Tensor:
    """GraBo: sum_t |a_t| of each feature."""
    return side_TF.abs().sum(0, dtype=torch.float32)


def _estimate(side_TF: Tensor, signs_T: Tensor) -> Tensor:
    """GraEst: |sum_t s_t a_t| of each feature."""
    return (signs_T @ side_TF).float().abs()


def _draw_from(weights: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n numbers of [0, len(weights)), with replacement, in proportion to the weights; evenly where all are zero."""
    ends = weights.double().cpu().cumsum(0)
    if not float(ends[-1]) > 0:
        return torch.randint(weights.numel(), (n,), generator=rng, device="cpu")
    at = torch.rand(n, generator=rng, dtype=torch.float64, device="cpu") * ends[-1]
    return torch.searchsorted(ends, at, right=True).clamp_(max=weights.numel() - 1)
