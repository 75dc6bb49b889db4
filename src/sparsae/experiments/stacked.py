"""Runs that train together as one batched program, in this process."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.experiments.board import Board
from sparsae.experiments.execution import Ended, Executor
from sparsae.experiments.jobs import Job, mark_stacked, running
from sparsae.stack.drive import together
from sparsae.train.passes import Passes
from sparsae.train.stopping import StopRequest


class Stacked(Executor):
    """At most `size` at a time; those of equal shapes share their forward and backward passes."""

    def __init__(self, size: int, stop: StopRequest) -> None:
        self._size, self._stop = size, stop

    def run(self, jobs: Sequence[Job], out: Path, board: Board, ended: Ended) -> bool:
        """See `Executor`."""
        # Runs of equal shapes beside each other, in the order in which the plan has them.
        places: dict[Hashable, list[Job]] = {}
        for job in jobs:
            places.setdefault(_likely_shape(job.config), []).append(job)
        ordered, failures = [job for alike in places.values() for job in alike], list[str]()

        def train(job: Job) -> Passes[bool]:
            try:
                return (yield from running(out / job.name, job.config, self._stop))
            except InputError as error:
                failures.append(f"{job.name}: {error}")
                self._stop.ask()  # the others are saved
                return False

        def begun() -> Iterator[Passes[bool]]:
            for job in ordered:
                if self._stop.asked:
                    return
                mark_stacked(out, job)
                board.begin(job)
                yield train(job)

        done = 0
        for number, finished in together(begun(), self._size):
            if finished:
                done += 1
                board.end(ordered[number])
                ended(ordered[number])
        if failures:
            raise InputError(failures[0])
        return done == len(jobs)


def refuse(job: Job) -> None:
    """Raise InputError for a run that cannot be stacked: with dropout, which torch draws for one model, or compiled."""
    config = job.config
    for name, value, wanted in (
        ("model.dropout", config.model.dropout, "0"),
        ("training.compile", config.training.compile, "false"),
    ):
        if value:
            raise InputError(
                f"{job.name}: {name} is {str(value).lower()}, which runs that train together cannot have: set it to "
                f"{wanted}, or leave out --stack"
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
        training.device,
    )
