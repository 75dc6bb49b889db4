"""One run of an experiment: where it lies, and how it is begun, resumed, or left as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.config import Config
from sparsae.config.load import with_absolute_paths
from sparsae.core.record import decode, encode
from sparsae.errors import DivergedError, InputError
from sparsae.files import read_json, to_json, write_atomically
from sparsae.runs.directory import RunDirectory
from sparsae.runs.metrics import steps_done
from sparsae.runs.summary import Summary, read_summary

if TYPE_CHECKING:
    from sparsae.train.passes import Passes
    from sparsae.train.stopping import StopRequest

_DIVERGED, _STACKED = "diverged.json", "stacked.json"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that diverged after so many steps, and what it had taken by then."""

    diverged: bool = True
    steps: int
    train_flops: int
    message: str


@dataclass(frozen=True)
class Job:
    """A run by its directory below the experiment's, its settings, and the operations that it is expected to take."""

    name: str
    config: Config
    flops: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for another process."""
        return {"name": self.name, "config": self.config.model_dump(mode="json"), "flops": self.flops}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """From `to_dict`."""
        return cls(values["name"], Config.model_validate_json(json.dumps(values["config"])), values["flops"])


def job_of(name: str, config: Config, flops: int) -> Job:
    """A job that can be resumed from anywhere, and loses at most a tenth of itself when it is killed."""
    training = config.training
    if training.checkpoint_every is None:
        every = max(10, training.steps // 10)
        config = config.model_copy(update={"training": training.model_copy(update={"checkpoint_every": every})})
    return Job(name, with_absolute_paths(config), flops)


def require_here(job: Job) -> None:
    """InputError, naming the job, where this machine has not what it would be trained with."""
    from sparsae.train.machine import require_machine

    try:
        require_machine(job.config)
    except InputError as error:
        raise InputError(f"{job.name}: {error}") from None


def forget_checkpoints(out: Path, job: Job) -> None:
    """Remove the weights of a finished job, of which only the results are wanted."""
    shutil.rmtree(out / job.name / "checkpoints", ignore_errors=True)


def outcome(directory: Path) -> Summary | Failure | None:
    """The summary of a finished run; of one that diverged, what is known of it; else None."""
    if (failure := directory / _DIVERGED).is_file():
        return decode(Failure, read_json(failure), str(failure))
    file = RunDirectory(directory).summary
    summary = read_summary(file) if file.is_file() else None
    return summary if summary and summary.finished else None


def require_same_settings(directory: Path, config: Config) -> None:
    """InputError where a directory holds the run of other settings."""
    run = RunDirectory(directory)
    if run.begun() and run.config() != config:
        raise InputError(f"{directory}: holds a run with other settings; give a new --out, or remove that directory")


def run_job(directory: Path, config: Config, stop: StopRequest | None = None) -> bool:
    """Bring a run to its end: True; False where a signal stopped it after it was saved.

    A finished run is left as it is, and one that was begun is resumed. stop: what else may stop it.
    """
    from sparsae.train.passes import alone

    return alone(running(directory, config, stop))


def running(directory: Path, config: Config, stop: StopRequest | None = None) -> Passes[bool]:
    """As `run_job`, by whoever answers its passes; stop: by which it may be asked to stop, beside other runs."""
    if outcome(directory) is not None:
        return True
    from sparsae.train.run import resuming, starting

    try:
        if RunDirectory(directory).begun():
            summary = yield from resuming(directory, quiet=True, stop=stop)
        else:
            summary = yield from starting(config, directory, quiet=True, stop=stop)
    except DivergedError as error:
        directory.mkdir(parents=True, exist_ok=True)
        failure = Failure(steps=error.step, train_flops=error.train_flops, message=str(error))
        write_atomically(directory / _DIVERGED, to_json(encode(failure), indent=2) + "\n")
        return True
    return summary.finished


def mark_stacked(out: Path, job: Job) -> None:
    """Write down that a job trains together with others: its times are not its own."""
    names = stacked(out) | {job.name}
    write_atomically(out / _STACKED, to_json({"runs": sorted(names)}, indent=1) + "\n")


def stacked(out: Path) -> set[str]:
    """The names of the jobs of which that was written down."""
    path = out / _STACKED
    return set(read_json(path)["runs"]) if path.is_file() else set()


def progress(directory: Path) -> int:
    """Steps done by a run, as far as its metrics say."""
    return steps_done(RunDirectory(directory).metrics)
