"""How long each run must be so that all cost the same: the number of steps that spends a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sparsae.config import Config
from sparsae.config.section import LARGEST
from sparsae.errors import InputError
from sparsae.experiments.plan import Match
from sparsae.train.forecast import as_dense, count_flops, untrained

_WINDOW = 4  # schedules that scale with the steps move by whole updates: the best count may lie a few steps away


@dataclass(frozen=True)
class Budget:
    """An amount of floating-point operations, tokens or steps that a run may take."""

    match: Match
    amount: float

    def part(self, share: float) -> Budget:
        """A share of it."""
        return Budget(self.match, self.amount * share)


class Cost:
    """What a run takes in each of the three coins, as a function of its number of steps."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        self.config = config
        self._model: nn.Module = untrained(config, vocab_size)
        self._known: dict[int, tuple[int, float]] = {}

    def flops(self, steps: int) -> int:
        """Counted operations of all parts, schedules being stretched to `steps`."""
        return self._both(steps)[0]

    def as_dense(self, steps: int) -> float:
        """The same if all arithmetic were dense."""
        return self._both(steps)[1]

    def _both(self, steps: int) -> tuple[int, float]:
        if steps not in self._known:
            flops, dense = count_flops(with_steps(self.config, steps), self._model)
            self._known[steps] = flops.total, as_dense(flops, dense, self._model)
        return self._known[steps]

    def of(self, match: Match, steps: int) -> float:
        """What `steps` steps take of the coin that runs are matched on."""
        if match == "flops":
            return self.flops(steps)
        return steps * (self.config.tokens_per_step if match == "tokens" else 1)

    def steps(self, budget: Budget, name: str, advice: str) -> int:
        """The number of steps whose cost is nearest to the budget.

        advice: where the budget was given. Raises InputError where not even one step is near it, and where it is worth
        more steps than a run may have.
        """
        if budget.amount < 0.5 * self.of(budget.match, 1):
            raise InputError(
                f"{name}: one step takes {self.of(budget.match, 1):.4g} {budget.match}, the budget is "
                f"{budget.amount:.4g}: raise {advice}"
            )
        if budget.match == "flops":
            steps = _nearest(self.flops, budget.amount, self.config.training.steps)
        else:
            steps = max(1, round(budget.amount / self.of(budget.match, 1)))
        if steps > LARGEST:
            raise InputError(
                f"{name}: a budget of {budget.amount:.4g} {budget.match} is more than {LARGEST:,} steps, the most that "
                f"a run may have: lower {advice}"
            )
        return steps


def with_steps(config: Config, steps: int) -> Config:
    """The settings of a run of another length."""
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def _nearest(cost: Callable[[int], float], amount: float, first: int) -> int:
    """The whole number whose cost, nearly proportional to it, is nearest to an amount; above LARGEST, any."""
    steps = max(1, first)
    for _ in range(20):
        proposed = max(1, round(steps * amount / cost(steps)))
        if proposed == steps:
            break
        steps = proposed
        if steps > LARGEST:
            return steps
    window = range(max(1, steps - _WINDOW), steps + _WINDOW + 1)
    return min(window, key=lambda n: (abs(cost(n) - amount), n))
