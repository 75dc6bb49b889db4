"""How jobs are executed: one after the other here, several at once in worker processes, or over a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparsae.errors import InputError
from sparsae.experiments.board import Board
from sparsae.experiments.jobs import Job, outcome, require_same_settings, run_job
from sparsae.train.stopping import StopRequest, handled

Ended = Callable[[Job], None]


class Executor(ABC):
    """A way to run jobs."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], out: Path, board: Board, ended: Ended) -> bool:
        """Run jobs below a directory and call `ended` after each; False where a signal stopped it.

        Raises InputError, naming the job, where one cannot be run.
        """

    def close(self) -> None:  # noqa: B027 - not every way keeps something open
        """Give back what is kept open between calls of `run`."""


def execute(jobs: Sequence[Job], out: Path, board: Board, ended: Ended, executor: Executor) -> bool:
    """Bring all jobs to their ends, each once, as `Executor.run`; those that are done are left as they are.

    Raises InputError also where the directory of one holds a run of other settings.
    """
    jobs = list({job.name: job for job in jobs}.values())
    for job in jobs:
        require_same_settings(out / job.name, job.config)
    todo = [job for job in jobs if outcome(out / job.name) is None]
    with board.watching(jobs, out):
        return executor.run(todo, out, board, ended) if todo else True


class InOrder(Executor):
    """One after the other, in this process."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def run(self, jobs: Sequence[Job], out: Path, board: Board, ended: Ended) -> bool:
        """See `Executor`."""
        for job in jobs:
            if self._stop.asked:
                return False
            board.begin(job)
            try:
                finished = run_job(out / job.name, job.config, self._stop)
            except InputError as error:
                raise InputError(f"{job.name}: {error}") from None
            if not finished:
                return False
            board.end(job)
            ended(job)
        return True


class Workers(Executor):
    """Several at once: `count` processes of this machine, which share its cores.

    lock: a file descriptor that the processes keep open, so that what it locks stays locked while one of them lives.
    """

    def __init__(self, count: int, lock: int) -> None:
        self._count, self._lock = count, lock
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, jobs: Sequence[Job], out: Path, board: Board, ended: Ended) -> bool:
        """See `Executor`."""
        queue, lock, failures, broken = list(jobs), threading.Lock(), list[str](), list[BaseException]()
        stopped = threading.Event()
        threads = max(1, (os.cpu_count() or 1) // self._count)
        while len(self._processes) < min(self._count, len(jobs)):
            self._processes.append(_worker(threads, self._lock))

        def serve(process: subprocess.Popen[str]) -> None:
            try:
                answer_all(process)
            except BaseException as error:  # raised again where the caller sees it
                broken.append(error)

        def answer_all(process: subprocess.Popen[str]) -> None:
            while not stopped.is_set() and not failures and not broken:
                with lock:
                    if not queue:
                        return
                    job = queue.pop(0)
                    board.begin(job)
                answer = _ask(process, job.to_json(out))
                with lock:
                    if "error" in answer:
                        failures.append(f"{job.name}: {answer['error']}")
                    elif answer.get("finished"):
                        board.end(job)
                        ended(job)
                    else:
                        stopped.set()

        with _forwarded(self._processes, stopped):
            servers = [threading.Thread(target=serve, args=(process,)) for process in self._processes]
            for server in servers:
                server.start()
            for server in servers:
                server.join()
        if broken:
            raise broken[0]
        if failures and not stopped.is_set():
            raise InputError(failures[0])
        return not stopped.is_set()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with process:  # closes its pipes, upon which it ends, and waits for that
                pass


def _worker(threads: int, lock: int) -> subprocess.Popen[str]:
    # Its own session: a Ctrl-C reaches it once, through us, and not twice, which would end it without saving.
    return subprocess.Popen(
        [sys.executable, "-m", "sparsae.experiments.worker", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=(lock,),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def _ask(process: subprocess.Popen[str], line: str) -> dict[str, object]:
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline() if process.stdout else ""
    except OSError:
        answer = ""
    if not answer:
        return {"error": f"its worker process ended with code {process.wait()}"}
    read: dict[str, object] = json.loads(answer)
    return read


@contextmanager
def _forwarded(processes: Sequence[subprocess.Popen[str]], stopped: threading.Event) -> Iterator[None]:
    """While inside, a signal to stop asks the workers to save and stop; this process waits for them."""

    def forward(number: int, frame: FrameType | None) -> None:
        stopped.set()
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    with handled(forward):
        yield
