"""The composite proxy by which candidates are compared; lower is better.

    P = w1 CE + w2 D - w3 A

CE: cross entropy on the micro-batch (nats). D, `L1_Mask_Diversity`: standard deviation over layers and heads of
active / total. A, `Avg_Layer_Gradient_Activity`: mean over layers of the L2 norm of the gradient at active weights.
Standardized, each component is (x - mean) / deviation over everything scored so far in the run. Annealed, w2 and w3 go
to 0 over the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsae.config.section import NonNegative, Section
from sparsae.core.cadence import decayed
from sparsae.core.observation import LayerView, head_densities
from sparsae.rules.parts.rule import Score

if TYPE_CHECKING:
    from torch import Tensor

    from sparsae.core.heads import HeadLayout
    from sparsae.core.topology import Topology
    from sparsae.surgery import Change


class ProxyConfig(Section):
    """P = w1 CE + w2 diversity - w3 activity; lower is better."""

    loss_weight: NonNegative = Field(
        default=1.0, description="w1, weight of the cross entropy on the micro-batch (nats)"
    )
    diversity_weight: NonNegative = Field(
        default=0.01, description="w2, weight of the deviation of densities over layers and heads"
    )
    activity_weight: NonNegative = Field(
        default=0.005, description="w3, weight of the mean gradient norm of the layers"
    )
    standardize: bool = Field(default=False, description="standardize each component by its running mean and deviation")
    anneal: Literal["none", "linear", "cosine"] = Field(
        default="none", description="how w2 and w3 go to 0 over the run"
    )
    activity: Literal["candidate", "training", "moments"] = Field(
        default="moments",
        description="gradient norms come from the candidate's backward pass, the last training step, or Adam's moments",
    )


@dataclass(frozen=True)
class Running:
    """Running mean and sum of squared deviations of each component (Welford, 1962)."""

    count: int = 0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    square: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def including(self, scores: Iterable[Score]) -> Running:
        """After more scores."""
        count, mean, square = self.count, list(self.mean), list(self.square)
        for score in scores:
            count += 1
            for i, x in enumerate(_components(score)):
                delta = x - mean[i]
                mean[i] += delta / count
                square[i] += delta * (x - mean[i])
        return Running(count, (mean[0], mean[1], mean[2]), (square[0], square[1], square[2]))

    def standardized(self, score: Score) -> Score:
        """(x - mean) / deviation of each component; a component that never varied gives 0."""
        out = []
        for x, mean, square in zip(_components(score), self.mean, self.square, strict=True):
            deviation = math.sqrt(square / self.count) if self.count else 0.0
            out.append((x - mean) / deviation if deviation > 1e-12 * max(1.0, abs(mean)) else 0.0)
        return Score(*out)


def combine(score: Score, config: ProxyConfig, running: Running, progress: float) -> float:
    """P of one topology. Raw components in, `running` already including them."""
    parts = running.standardized(score) if config.standardize else score
    fade = decayed("constant" if config.anneal == "none" else config.anneal, progress)
    return (
        config.loss_weight * parts.cross_entropy
        + config.diversity_weight * fade * parts.diversity
        - config.activity_weight * fade * parts.activity
    )


def diversity(topologies: Mapping[str, Topology], heads: Mapping[str, HeadLayout]) -> float:
    """Standard deviation of active / total over layers; a layer with attention heads counts once a head."""
    import torch

    parts = [
        head_densities(topology, heads[name]).cpu()
        if name in heads
        else torch.tensor([topology.density], dtype=torch.float64, device="cpu")
        for name, topology in topologies.items()
    ]
    return float(torch.cat(parts).std(correction=0))


def activity(norms: Sequence[float]) -> float:
    """Mean over layers of the L2 norm of the gradient at active weights."""
    return sum(norms) / len(norms)


def known_gradient_norm(view: LayerView, change: Change | None, source: str) -> float:
    """L2 norm of the gradient at a layer's active weights after a change, without a backward pass.

    source "training": the last training gradients, and for grown units the sampled ones where they were taken;
    "moments": the optimizer's average gradient, which a grown unit does not have.
    """
    import torch

    active = view.gradient if source == "training" else view.moment
    assert active is not None
    squares = _unit_squares(active)
    if change is None:
        return math.sqrt(float(squares.sum()))
    kept = change.source[~change.grown]
    total = float(squares[kept].sum())
    if source == "training" and view.sample is not None and view.sample_gradient is not None and view.sample.numel():
        grown = change.after.indices[change.grown].to(view.sample.device, view.sample.dtype)
        at = torch.searchsorted(view.sample, grown).clamp_(max=view.sample.numel() - 1)
        known = view.sample[at] == grown
        total += float(_unit_squares(view.sample_gradient)[at[known]].sum())
    return math.sqrt(total)


def _unit_squares(tensor: Tensor) -> Tensor:
    return tensor.double().square().reshape(tensor.shape[0], -1).sum(1)


def _components(score: Score) -> tuple[float, ...]:
    return tuple(getattr(score, field.name) for field in fields(score))
