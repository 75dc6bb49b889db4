"""A run as a conversation: it says which gradients it wants next, and continues once its parameters have them.

What trains alone answers each pass by its own forward and backward pass; several runs can be answered by one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sparsae.losses import LossParts
from sparsae.train.objective import Objective

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward and backward pass: the gradient of `loss / passes` is added to the parameters' own.

    batch: (B, context + 1) tokens. alpha: weight of the KL term. taught: how many of the sequences the teacher reads.
    passes: those of an optimizer step.
    """

    objective: Objective
    batch: Tensor
    alpha: float
    taught: int
    passes: int

    def loss(self, hidden_TD: Tensor | None = None) -> LossParts:
        """What is trained; hidden_TD: the decoder's hidden states, where they have been computed."""
        return self.objective.loss(self.batch, self.alpha, self.taught, hidden_TD)


Passes = Generator[Pass, LossParts, T]
"""Yields the passes that it wants, is sent their losses once gradients are there, and returns a result."""


def alone(passes: Passes[T]) -> T:
    """Answer every pass by itself; the result."""
    try:
        wanted = next(passes)
        while True:
            try:
                parts = wanted.loss()
                (parts.total / wanted.passes).backward()
            except BaseException as error:
                passes.throw(error)  # the run says what it was about, and leaves its directory as it should be
                raise
            wanted = passes.send(parts)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        passes.close()
