"""A run as a conversation: it says what it wants computed next, and continues with what was found.

What trains alone answers each request by itself; those of several runs can be answered together.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from sparsae.losses import LossParts
from sparsae.optim import AdamW, clip_gradients
from sparsae.train.objective import Objective

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward and backward pass: the gradient of `loss / passes` is added to the parameters' own.

    Answered by the parts of the loss. batch: (B, context + 1) tokens. alpha: weight of the KL term. taught: how many of
    the sequences the teacher reads. passes: those of an optimizer step.
    """

    objective: Objective
    batch: Tensor
    alpha: float
    taught: int
    passes: int

    def loss(self, hidden_TD: Tensor | None = None) -> LossParts:
        """What is trained; hidden_TD: the decoder's hidden states, where they have been computed."""
        return self.objective.loss(self.batch, self.alpha, self.taught, hidden_TD)

    def answer(self) -> LossParts:
        """By a pass of its own."""
        parts = self.loss()
        (parts.total / self.passes).backward()
        return parts


@dataclass(frozen=True, eq=False)
class Step:
    """The optimizer's step, after the gradients of `parameters` were scaled to have at most the norm `clip`.

    Answered by their norm before (a float). The step is not made where that is not finite, nor where the loss was not.
    """

    optimizer: AdamW
    parameters: Sequence[nn.Parameter]
    clip: float | None
    loss_is_finite: bool

    def clipped(self) -> Tensor:
        """The norm, once gradients are scaled."""
        return clip_gradients(self.parameters, self.clip)

    def is_made(self, norm: float) -> bool:
        """Whether the step is, with gradients of this norm."""
        return self.loss_is_finite and math.isfinite(norm)

    def answer(self) -> float:
        """By a step of its own."""
        if self.is_made(norm := float(self.clipped())):
            self.optimizer.step()
        return norm


Request = Pass | Step
Passes = Generator[Request, Any, T]
"""Yields what it wants, is sent the answers, and returns a result."""


def alone(passes: Passes[T]) -> T:
    """Answer every request by itself; the result."""
    try:
        wanted = next(passes)
        while True:
            try:
                answer = wanted.answer()
            except BaseException as error:
                passes.throw(error)  # the run says what it was about, and leaves its directory as it should be
                raise
            wanted = passes.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        passes.close()
