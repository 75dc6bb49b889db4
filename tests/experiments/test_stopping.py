"""Signals that come more than once to an experiment with worker processes: what was begun is saved all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sparsae.experiments.workers import _forwarded
from sparsae.train.stopping import StopRequest
from tests.support.runs import write_text

SECONDS = 120


@contextmanager
def comparison(out: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two long runs in two workers; inside, both have begun to train."""
    small = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=32", "data.tokenizer_vocab=300"]
    settings = [
        f"data.source={write_text(out.parent / 'text')}",
        "data.validation_share=0.1",
        "training.steps=50000",
        "training.log_every=1",
        *small,
    ]
    command = [sys.executable, "-m", "sparsae", "compare", "--preset", "demo", "--methods", "static,set"]
    command += ["--seeds", "1", "--match", "steps", "--jobs", "2", "--out", str(out)]
    for each in settings:
        command += ["--set", each]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS
        while len(trained(out)) < 2:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process
    finally:
        for pid in [process.pid, *workers(out)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def trained(out: Path) -> list[Path]:
    """The runs that have a row of training."""
    return [path.parent for path in out.glob("runs/*/metrics.jsonl") if b'"kind": "train"' in path.read_bytes()]


def workers(out: Path) -> list[int]:
    """The processes that hold a run's lock."""
    return [int(found.name) for found in Path("/proc").glob("[0-9]*") if _holds(found, out)]


def _holds(process: Path, out: Path) -> bool:
    try:
        return any(str(os.readlink(handle)).startswith(str(out)) for handle in (process / "fd").iterdir())
    except OSError:
        return False


def to_all(out: Path, process: subprocess.Popen[bytes]) -> None:
    for pid in {process.pid, *workers(out)}:
        os.kill(pid, signal.SIGTERM)


def one_by_one(*numbers: signal.Signals) -> Callable[[Path, subprocess.Popen[bytes]], None]:
    def send(out: Path, process: subprocess.Popen[bytes]) -> None:
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.01)

    return send


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (one_by_one(signal.SIGUSR1, signal.SIGTERM), 130),
        (one_by_one(signal.SIGINT, signal.SIGTERM), 130),
        (one_by_one(signal.SIGXCPU, signal.SIGXCPU), 130),
        (one_by_one(signal.SIGTERM, signal.SIGTERM), 130),  # as `timeout` does
        (one_by_one(signal.SIGTERM, signal.SIGKILL), -signal.SIGKILL),
        (one_by_one(signal.SIGKILL), -signal.SIGKILL),
        (to_all, 130),
    ],
)
def test_what_was_begun_is_saved(
    stop: Callable[[Path, subprocess.Popen[bytes]], None], code: int, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with comparison(out, log) as process:
        stop(out, process)
        assert process.wait(SECONDS) == code, log.read_text()
        deadline = time.monotonic() + SECONDS
        while workers(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not workers(out)
    assert "Traceback" not in log.read_text()
    assert ("stopped and saved" in log.read_text()) == (code == 130)
    for run in trained(out):
        (state,) = run.glob("checkpoints/step-*/state.json")
        assert int(state.parent.name.removeprefix("step-")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_signal_twice_ends_at_once_and_says_no_more(number: signal.Signals, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with comparison(out, log) as process:
        process.send_signal(number)
        time.sleep(0.25)  # at once it would be the same one
        process.send_signal(number)
        assert process.wait(SECONDS) == 130
        assert not workers(out)
    assert "Traceback" not in log.read_text()


class Process:
    """A worker that never ends by itself, and notes what it is sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        self.sent.append(signal.Signals(number).name)

    def kill(self) -> None:
        self.sent.append("SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_are_killed_by_the_same_signal_later_and_not_at_once(number: signal.Signals) -> None:
    process = Process()

    def stopped(pause: float) -> None:
        with _forwarded([process], threading.Event(), StopRequest()):  # type: ignore[list-item]
            os.kill(os.getpid(), number)
            time.sleep(pause)
            os.kill(os.getpid(), number)

    try:
        stopped(0.0)
    except KeyboardInterrupt:  # which would end all tests
        pytest.fail("the two signals were not taken for one")
    assert set(process.sent) == {"SIGTERM"}
    with pytest.raises(KeyboardInterrupt):
        stopped(0.25)
    assert process.sent[-1] == "SIGKILL"
