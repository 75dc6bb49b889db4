"""The loss whose gradients are means over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsae.core.ranks import ranks
from sparsae.losses import LossParts


def over_ranks(model: nn.Module, loss: Callable[..., LossParts]) -> Callable[..., LossParts]:
    """The same loss, of which several ranks reduce the gradients with respect to the model while they are computed."""
    return loss if ranks().count == 1 else DistributedDataParallel(_Forward(model, loss))


class _Forward(nn.Module):
    """A loss as the forward pass of a module, which is what data parallelism can watch."""

    def __init__(self, model: nn.Module, loss: Callable[..., LossParts]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, *given: Any) -> LossParts:
        return self._loss(*given)
