"""A run that goes on is shown until it ends, and its page reloads only until then."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from sparsae.cli import main
from sparsae.cli.watch import spark
from sparsae.report.page import write_report
from sparsae.runs.lock import LOCK, is_locked, locked
from sparsae.train.run import start
from tests.support.runs import config_of, stopped_at, write_text

REFRESH = 'http-equiv="refresh"'


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    with stopped_at(6):
        start(config_of(write_text(folder / "text"), folder / "cache", method="sparsae"), folder / "run", quiet=True)
    return folder / "run"


def test_it_ends_with_the_run(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is going on has its lock held and no summary."""
    (stopped / "summary.json").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(stopped, "this run"))
        looks = []

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            assert REFRESH in (stopped / "report.html").read_text()
            if len(looks) == 2:
                stack.close()

        monkeypatch.setattr("time.sleep", sleep)
        assert main(["watch", str(stopped), "--every", "0.5", "--page"]) == 0
    assert looks == [0.5, 0.5]
    first, last = capsys.readouterr().out.splitlines()
    assert "step 6 of 12" in first
    assert "left" in first
    assert last.endswith("not going on")
    assert REFRESH not in (stopped / "report.html").read_text()


def test_a_run_that_is_being_set_up_is_waited_for(
    tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is locked and empty while its text is read."""
    run, looks = tmp_path / "run", []
    run.mkdir()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run, "this run"))

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:
                shutil.copytree(stopped, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK))
                stack.close()

        monkeypatch.setattr("time.sleep", sleep)
        assert main(["watch", str(run), "--every", "0.5"]) == 0
    assert looks == [0.5, 0.5, 0.5]
    assert "step 6 of 12" in capsys.readouterr().out


def test_a_lock_is_seen_and_left_alone(tmp_path: Path, stopped: Path) -> None:
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, "this run"):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert REFRESH not in write_report(stopped).read_text()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err


def test_a_curve_in_blocks() -> None:
    assert spark([0.0, float("nan"), 1.0, 0.5]) == "▁ █▅"
    assert spark([2.0, 2.0]) == "▁▁"
    assert spark([]) == ""
    assert len(spark([float(n) for n in range(100)])) == 60
