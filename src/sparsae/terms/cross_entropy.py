"""CE: the loss of a topology, with its values as they would be, on a micro-batch of held-out text (nats a token)."""

from __future__ import annotations

from pydantic import Field

from sparsae.config.rules import TermConfig
from sparsae.config.section import NonNegative
from sparsae.registry import TERMS
from sparsae.score import Term, Trial


class CrossEntropyConfig(TermConfig):
    """The cross entropy on the micro-batch."""

    weight: NonNegative = Field(default=1.0, description="w1, weight of the cross entropy (nats)")


@TERMS.register("cross_entropy", CrossEntropyConfig)
class CrossEntropy(Term[CrossEntropyConfig]):
    """What the model is trained to lower; its weight does not anneal."""

    label, unit = "Cross entropy of the micro-batch", "nats"
    needs = frozenset({"loss"})
    anneals = False

    def value(self, trial: Trial) -> float:
        return trial.loss
