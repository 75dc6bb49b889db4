"""A, `Avg_Layer_Gradient_Activity`: the mean over layers of the L2 norm of the gradient at active weights.

The gradient is one of three: that of the candidate's own loss, which costs a backward pass; that of the last training
step, and for grown units the sampled one where one was taken; or the optimizer's average, which a grown unit does not
have. What the last two do not know counts as 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsae.config.rules import TermConfig
from sparsae.config.section import NonNegative
from sparsae.core.observation import LayerView, Need
from sparsae.registry import TERMS
from sparsae.score import Term, Trial

if TYPE_CHECKING:
    from torch import Tensor

    from sparsae.surgery import Change

_NEEDS: dict[str, Need] = {"candidate": "candidate_gradient", "training": "gradient", "moments": "moments"}


class ActivityConfig(TermConfig):
    """The mean gradient norm of the layers."""

    weight: NonNegative = Field(default=0.005, description="w3, weight of the mean gradient norm; higher is better")
    source: Literal["candidate", "training", "moments"] = Field(
        default="moments",
        description="gradients of the candidate's backward pass, of the last training step, or Adam's moments",
    )


@TERMS.register("activity", ActivityConfig)
class Activity(Term[ActivityConfig]):
    """How much the active weights would learn."""

    label, unit = "Mean gradient activity", "L2 norm"
    higher_is_better = True

    def __init__(self, config: ActivityConfig) -> None:
        super().__init__(config)
        self.needs = frozenset({_NEEDS[config.source]})

    def value(self, trial: Trial) -> float:
        from sparsae.core.host import on_host

        if self.config.source == "candidate":
            norms = list(trial.gradient_norms.values())
        else:
            # A device is waited for once, not for each layer, unless there is a sample of the last step's gradient.
            squares = on_host([self._known(view, trial.changes.get(name)) for name, view in trial.views.items()])
            norms = [math.sqrt(float(square)) for square in squares]
        return sum(norms) / len(norms)

    def _known(self, view: LayerView, change: Change | None) -> Tensor:
        """Square of the norm of the gradient at a layer's active weights after a change, without a backward pass."""
        import torch

        training = self.config.source == "training"
        active = view.gradient if training else view.moment
        assert active is not None
        squares = _unit_squares(active)
        if change is None or not squares.numel():
            total = squares.sum()
        else:
            total = squares[change.source.clamp(min=0)].masked_fill(change.grown, 0.0).sum()
        sample, gradient = view.sample, view.sample_gradient
        if change is not None and training and sample is not None and gradient is not None and sample.numel():
            grown = change.grow.to(sample.device, sample.dtype)
            at = torch.searchsorted(sample, grown).clamp_(max=sample.numel() - 1)
            is_known = sample[at] == grown
            total = total + _unit_squares(gradient)[at].masked_fill(~is_known, 0.0).sum().to(total.device)
        return total


def _unit_squares(tensor: Tensor) -> Tensor:
    return tensor.double().square().flatten(1).sum(1) if tensor.dim() > 1 else tensor.double().square()
