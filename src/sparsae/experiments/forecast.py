"""What an experiment will be, before it is one: its runs, how long each is, and what they take together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsae.config import Config
from sparsae.experiments.jobs import Job
from sparsae.experiments.matching import Cost
from sparsae.train.forecast import measured_flops_per_second
from sparsae.train.machine import require_machine


@dataclass(frozen=True)
class Planned:
    """So many runs that differ in what costs nothing; steps, tokens and operations of each.

    dense_flops: the operations as if all arithmetic were dense, from which a time is expected.
    """

    what: str
    sparsity: float
    config: Config
    runs: int
    steps: int
    tokens: int
    train_flops: int
    dense_flops: float

    @classmethod
    def of(cls, what: str, sparsity: float, job: Job, cost: Cost) -> Planned:
        """What is said of one job."""
        steps = job.config.training.steps
        tokens = steps * job.config.tokens_per_step
        return cls(what, sparsity, job.config, 1, steps, tokens, job.flops, cost.as_dense(steps))


def merged(planned: Iterable[Planned]) -> list[Planned]:
    """With those that are called the same and take the same in one."""
    found: dict[tuple[object, ...], Planned] = {}
    for each in planned:
        require_machine(each.config)
        key = each.what, each.sparsity, each.steps, each.tokens, each.train_flops
        found[key] = replace(found[key], runs=found[key].runs + each.runs) if key in found else each
    return list(found.values())


def foresee(planned: Sequence[Planned]) -> dict[str, Any]:
    """A row for each group of runs, and what all of them take.

    The times are those of dense products at the rate of a short measurement on this machine, one run after another.
    Raises InputError where this machine could not train one of them.
    """
    rates: dict[tuple[str, str], float] = {}
    for each in planned:
        key = each.config.training.device, each.config.training.precision
        rates[key] = rates.get(key) or measured_flops_per_second(each.config)
    seconds = [
        each.dense_flops / rates[each.config.training.device, each.config.training.precision] for each in planned
    ]
    return {
        "rows": [
            {
                "what": each.what,
                "sparsity": each.sparsity,
                "runs": each.runs,
                "steps": each.steps,
                "tokens": each.tokens,
                "train_flops": each.train_flops,
                "expected_seconds": expected,
            }
            for each, expected in zip(planned, seconds, strict=True)
        ],
        "runs": sum(each.runs for each in planned),
        "train_flops": sum(each.runs * each.train_flops for each in planned),
        "expected_seconds": sum(each.runs * expected for each, expected in zip(planned, seconds, strict=True)),
    }
