"""Several jobs at once, in worker processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from sparsae.errors import InputError
from sparsae.experiments.execution import Executor, Told
from sparsae.experiments.jobs import Job
from sparsae.experiments.stacked import by_shape
from sparsae.train.stopping import FirstSignal, StopRequest, handled

_TICK = 0.2  # seconds between looks at the clock

Answer = dict[str, Any]


class Workers(Executor):
    """`count` processes of this machine, which share its cores; each runs one job at a time, or a stack of its own.

    lock: a file descriptor that the processes keep open, so that what it locks stays locked while one of them lives.
    stack: how many jobs train together in each; None: each for itself. stop: when to stop, beside signals.
    """

    def __init__(self, count: int, lock: int, stack: int | None = None, stop: StopRequest | None = None) -> None:
        self._count, self._lock, self._stack, self._stop = count, lock, stack, stop or StopRequest()
        self._processes: list[subprocess.Popen[str]] = []
        self.together = stack is not None

    def run(self, jobs: Sequence[Job], out: Path, begun: Told, ended: Told) -> bool:
        """See `Executor`."""
        queue, lock, failures, broken = self._shares(jobs), threading.Lock(), list[str](), list[BaseException]()
        stopped = threading.Event()
        threads = max(1, (os.cpu_count() or 1) // self._count)
        while len(self._processes) < min(self._count, len(queue)):
            self._processes.append(_worker(threads, self._lock))

        def serve(process: subprocess.Popen[str]) -> None:
            try:
                answer_all(process)
            except BaseException as error:  # raised again where the caller sees it
                broken.append(error)
            if self.together and (failures or broken):
                _ask_to_stop(other for other in self._processes if other is not process)  # so that theirs are saved

        def answer_all(process: subprocess.Popen[str]) -> None:
            while not stopped.is_set() and not failures and not broken:
                with lock:
                    if not queue:
                        return
                    share = queue.pop(0)
                by_name = {job.name: job for job in share}
                for answer in _answers(process, share, out, self._stack):
                    with lock:
                        if "begun" in answer:
                            begun(by_name[answer["begun"]])
                        elif "ended" in answer:
                            ended(by_name[answer["ended"]])
                        elif "error" in answer:
                            # Once it was asked to stop, a process may end before it has begun to listen.
                            failures.extend([] if stopped.is_set() else [answer["error"]])
                        elif not answer["finished"]:
                            stopped.set()

        with _forwarded(self._processes, stopped, self._stop):
            servers = [threading.Thread(target=serve, args=(process,)) for process in self._processes]
            for server in servers:
                server.start()
            for server in servers:
                server.join()
        if broken:
            raise broken[0]
        if failures:
            raise InputError(failures[0])
        return not stopped.is_set()

    def _shares(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """What a process is asked for at once: one job, or all that it shall train."""
        if self._stack is None:
            return [[job] for job in jobs]
        ordered, count = by_shape(jobs), min(self._count, len(jobs))
        ends = [len(ordered) * part // count for part in range(count + 1)]
        return [ordered[begin:end] for begin, end in pairwise(ends)]

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


def _answers(process: subprocess.Popen[str], jobs: Sequence[Job], out: Path, stack: int | None) -> Iterator[Answer]:
    """What a process says of jobs that it is asked for, the last of which is that it has ended them, or an error."""
    assert process.stdin is not None
    assert process.stdout is not None
    line = json.dumps({"out": str(out), "stack": stack, "jobs": [job.to_dict() for job in jobs]})
    answer: Answer = {}
    while "finished" not in answer and "error" not in answer:
        try:
            if not answer:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            text = process.stdout.readline()
        except OSError:
            text = ""
        if text:
            answer = json.loads(text)
        else:
            answer = {"error": f"{jobs[0].name}: its worker process ended with code {process.wait()}"}
        yield answer


def _ask_to_stop(processes: Iterator[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


@contextmanager
def _forwarded(
    processes: Sequence[subprocess.Popen[str]], stopped: threading.Event, stop: StopRequest
) -> Iterator[None]:
    """While inside, a signal to stop, and the end of the time, ask the workers to save; this process waits for them.

    The first signal again, if it is Ctrl-C or SIGTERM, ends them at once, and raises KeyboardInterrupt.
    """
    over, first = threading.Event(), list[FirstSignal]()

    def forward(number: int, frame: FrameType | None) -> None:
        if first and first[0].is_repeated_by(number):
            for process in processes:
                process.kill()
            raise KeyboardInterrupt
        first.append(FirstSignal(number))
        stopped.set()
        _ask_to_stop(iter(processes))

    def watch() -> None:
        while not over.wait(_TICK):
            if stop.asked:
                stopped.set()
                _ask_to_stop(iter(processes))
                return

    clock = threading.Thread(target=watch, daemon=True)
    with handled(forward):
        clock.start()
        try:
            yield
        finally:
            over.set()
            clock.join()
