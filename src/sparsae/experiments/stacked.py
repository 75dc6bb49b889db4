"""Runs that train together as one batched program, in this process."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.experiments.execution import Executor, Told
from sparsae.experiments.jobs import Job, running
from sparsae.models import dropouts
from sparsae.stack.drive import together
from sparsae.train.passes import Passes
from sparsae.train.stopping import StopRequest


class Stacked(Executor):
    """At most `size` at a time; those of equal shapes share their forward and backward passes."""

    together = True

    def __init__(self, size: int, stop: StopRequest) -> None:
        self._size, self._stop = size, stop

    def run(self, jobs: Sequence[Job], out: Path, begun: Told, ended: Told) -> bool:
        """See `Executor`."""
        ordered, failures = by_shape(jobs), list[str]()

        def train(job: Job) -> Passes[bool]:
            try:
                return (yield from running(out / job.name, job.config, self._stop))
            except InputError as error:
                failures.append(f"{job.name}: {error}")
                self._stop.ask()  # the others are saved
                return False

        def coming() -> Iterator[Passes[bool]]:
            for job in ordered:
                if self._stop.asked:
                    return
                begun(job)
                yield train(job)

        done = 0
        try:
            for number, finished in together(coming(), self._size):
                if finished:
                    done += 1
                    ended(ordered[number])
        finally:
            if failures:
                raise InputError(failures[0])
        return done == len(jobs)


def by_shape(jobs: Sequence[Job]) -> list[Job]:
    """Runs of equal shapes beside each other, in the order in which the plan has them."""
    places: dict[Hashable, list[Job]] = {}
    for job in jobs:
        places.setdefault(_likely_shape(job.config), []).append(job)
    return [job for alike in places.values() for job in alike]


def refuse(job: Job) -> None:
    """Raise InputError for a run that cannot be stacked: with dropout, which torch draws for one model."""
    if found := dropouts(job.config.model):
        name = next(iter(found))
        raise InputError(
            f"{job.name}: {name} is {found[name]:g}, which runs that train together cannot have: set it to 0, or "
            "leave out --stack"
        )


def _likely_shape(config: Config) -> Hashable:
    """Equal for runs whose passes can be shared; the runs themselves say it when they begin."""
    training = config.training
    return (
        config.model.model_dump_json(),
        config.sparsity.sparsity == 0,
        config.sparsity.unit,
        training.batch_size,
        training.precision,
        (training.compile, training.compile_mode),
        training.device,
    )
