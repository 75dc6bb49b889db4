"""The size of recent weight changes: the mean over layers of the L2 norm of W_t - W_(t-T) at active weights.

T is the window, or the steps since the last update if they are fewer. A unit that the candidate grows has not moved: it
counts as 0, as one does that it drops.
"""

from __future__ import annotations

from pydantic import Field

from sparsae.config.rules import TermConfig
from sparsae.config.section import Count, NonNegative
from sparsae.core.observation import PastValues
from sparsae.registry import TERMS
from sparsae.score import Term, Trial


class WeightChangeConfig(TermConfig):
    """The mean change of the layers' weights in the last steps."""

    weight: NonNegative = Field(default=0.005, description="weight of the mean change; higher is better")
    window: Count = Field(default=100, description="T, optimizer steps before an update, or those since the last one")


@TERMS.register("weight_change", WeightChangeConfig)
class WeightChange(Term[WeightChangeConfig]):
    """Activity by what the active weights have learned, where `activity` looks at what they would learn."""

    label, unit = "Mean recent weight change", "L2 norm"
    higher_is_better = True

    def __init__(self, config: WeightChangeConfig) -> None:
        super().__init__(config)
        self.needs = frozenset({PastValues(config.window)})

    def value(self, trial: Trial) -> float:
        norms = []
        for name, view in trial.views.items():
            moved = view.values.double() - view.past[self.config.window].double()
            change = trial.changes.get(name)
            norms.append(float((moved if change is None else moved[change.source[~change.grown]]).norm()))
        return sum(norms) / len(norms)
