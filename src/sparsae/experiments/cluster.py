"""Runs over a Ray cluster (the extra `ray`): each a task of its own, as many at a time as the cluster has cores for.

The experiment's directory, the text and the cache must lie under the same paths on all machines; whatever a job is
resumed from is read there, so that it does not matter which machine resumes it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.experiments.execution import Executor, Told
from sparsae.experiments.jobs import Job, progress, run_job
from sparsae.kernels.processor import set_up_processor
from sparsae.train.stopping import handled

_TICK = 1.0  # seconds between looks at what has begun


class Cluster(Executor):
    """The tasks of a Ray cluster.

    address: of a cluster; "auto" finds the one that this machine belongs to, "local" starts one on this machine alone.
    cores: of each task, and of the one that "local" starts for as many tasks as fit; its threads follow them.
    """

    def __init__(self, address: str, cores: int = 1, local_cores: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--ray needs the extra: pip install 'sparsae[ray]'") from None
        self._ray: Any = ray
        self._cores = cores
        try:
            ray.init(
                address=address,
                num_cpus=local_cores if address == "local" else None,
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"--ray {address}: no such cluster: {first}; give its address, auto or local") from None

    def run(self, jobs: Sequence[Job], out: Path, begun: Told, ended: Told) -> bool:
        """See `Executor`."""
        ray, place = self._ray, out.resolve()
        task = ray.remote(num_cpus=self._cores, max_retries=0)(_run)
        waiting = {task.remote(str(place / job.name), job.config.model_dump_json(), self._cores): job for job in jobs}
        told: set[str] = set()
        stopped = threading.Event()
        with _stopping(stopped):
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=_TICK)
                for job in waiting.values():
                    if job.name not in told and progress(out / job.name):
                        told.add(job.name)
                        begun(job)
                for reference in done:
                    job = waiting.pop(reference)
                    answer = self._answer(reference, job)
                    if answer.get("finished"):
                        ended(job)
                    else:
                        stopped.set()
                if stopped.is_set():
                    self._stop(list(waiting))
                    return False
        return True

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()

    def _answer(self, reference: Any, job: Job) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            raise InputError(f"{job.name}: its task failed: {str(error).strip().splitlines()[-1]}") from None
        if "error" in answer:
            raise InputError(f"{job.name}: {answer['error']}")
        return answer

    def _stop(self, references: Sequence[Any]) -> None:
        """Interrupt the tasks, which save what they have, and wait for them."""
        for reference in references:
            self._ray.cancel(reference)
        self._ray.wait(list(references), num_returns=len(references), timeout=60) if references else None


def _run(directory: str, config: str, threads: int) -> str:
    """In a process of the cluster: run a job; the answer as JSON."""
    set_up_processor(threads)
    try:
        return json.dumps({"finished": run_job(Path(directory), Config.model_validate_json(config))})
    except (InputError, OSError) as error:
        return json.dumps({"error": " ".join(str(error).split())})


@contextmanager
def _stopping(stopped: threading.Event) -> Iterator[None]:
    """While inside, signals to stop set the event."""

    def take(number: int, frame: FrameType | None) -> None:
        stopped.set()

    with handled(take):
        yield
