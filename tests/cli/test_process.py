"""Streams that are closed, and signals to commands that train nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import sparsae.cli
from sparsae.__main__ import main as program
from sparsae.cli import main
from sparsae.cli.process import interruptible


@pytest.mark.parametrize("closed", ["1", "2", "0", "0 1 2"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """What is opened next must not get their numbers, to which libraries would write."""
    closing = " ".join(f"{number}>&-" for number in closed.split())
    command = f"exec {sys.executable} -m sparsae methods --json methods.json {closing}"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert "sparsae-written" in (tmp_path / "methods.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_signal_to_stop_is_a_ctrl_c_where_nobody_listens(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have ignored it, as nohup does
    try:
        monkeypatch.setattr(sparsae.cli, "describe", lambda run: os.kill(os.getpid(), number))
        assert main(["info", str(tmp_path)]) == 130
        assert "sparsae: interrupted" in capsys.readouterr().err
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, outside)


def test_the_second_signal_ends_at_once() -> None:
    now = []

    def stopped() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                now.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert now == [signal.SIG_DFL]


def test_who_listens_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_another_thread_handles_no_signals() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["methods"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_ctrl_c_while_the_commands_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing(name: str, *_: object) -> object:
        assert name == "sparsae.cli"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", importing)
        code = program()
    assert code == 130
    assert capsys.readouterr().err == "sparsae: interrupted\n"


def test_forked_processes_end_by_a_signal_as_any() -> None:
    """`multiprocessing.Pool` ends its own by SIGTERM, and waits for that."""
    program = """
import multiprocessing, signal
from sparsae.cli.process import interruptible
def handler(_):
    return str(signal.getsignal(signal.SIGTERM))
with interruptible():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(set(pool.map(handler, range(4))))
    print(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines() == [str({str(signal.SIG_DFL)}), "True"]


def test_a_signal_that_comes_as_a_process_is_forked_ends_it() -> None:
    """Before it has its signals back, too: it waits until then. In the parent it is taken once the fork is made."""
    program = """
import os, signal, time
def late():  # these run in the order in which they were registered: this one first
    os.kill(os.getpid(), signal.SIGTERM)
os.register_at_fork(after_in_child=late, after_in_parent=late)
from sparsae.cli.process import interruptible
with interruptible():
    try:
        child = os.fork()
        if child == 0:
            os._exit(7)
        time.sleep(5)
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted")
print(os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines() == ["interrupted", "True"]
