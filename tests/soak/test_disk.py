"""Crashes of the machine at every call that changes the disk, and disks that fail at every call of a save."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsae.config import Config
from sparsae.runs import checkpoint
from sparsae.runs.directory import RunDirectory
from sparsae.train.run import resume, start
from tests.support.disk import Disk, lay_out
from tests.support.runs import config_of, rows, stopped_at, weights, write_text

pytestmark = pytest.mark.soak

SAVED = ("training.checkpoint_every=4", "training.keep_checkpoints=2")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    torch.set_num_threads(1)
    text, cache = write_text(tmp_path_factory.mktemp("text")), tmp_path_factory.mktemp("cache")
    return lambda *overrides: config_of(text, cache, *SAVED, *overrides)


def test_every_crash_of_the_machine_is_recovered_from(make: Callable[..., Config], tmp_path: Path) -> None:
    """A run that is stopped and resumed; what every crash on its way would leave is resumed to the same end."""
    start(make(), tmp_path / "whole", quiet=True)
    run, config = tmp_path / "run", make()
    run.mkdir()
    disk, write, saved = Disk(run), checkpoint.write_whole, []

    def writing(directory: Path, *given: object) -> None:
        write(directory, *given)  # type: ignore[arg-type]
        saved.append((len(disk.images), directory.name))

    with pytest.MonkeyPatch.context() as patch, disk.recording():
        patch.setattr(checkpoint, "write_whole", writing)
        with stopped_at(6):
            start(config, run, quiet=True)
        resume(run, quiet=True)
    assert [name for _, name in saved] == ["step-00000004", "step-00000006", "step-00000008", "step-00000012"]
    assert len(disk.images) > 80
    ended: dict[str, int] = {}
    for number, (call, image) in enumerate(disk.images):
        folder = tmp_path / "crashed"
        lay_out(image, folder)
        there, told = RunDirectory(folder), f"image {number}, after {call}"
        steps = there.saved_steps()
        # A checkpoint that was advertised before, or a later one, is there.
        reached = max((int(name[5:]) for position, name in saved if position <= number), default=0)
        assert max(steps, default=0) >= reached, told
        if there.begun():
            summary = there.read_summary()
            if summary is None or not summary.finished:
                resume(folder, quiet=True)
        else:
            start(config, folder, quiet=True)
        assert rows(folder) == rows(tmp_path / "whole"), told
        assert weights(folder) == weights(tmp_path / "whole"), told
        ended[call] = ended.get(call, 0) + 1
        shutil.rmtree(folder)
    print(f"{len(disk.images)} crashes recovered, by the call before: {ended}")


def test_every_call_of_a_save_that_fails_leaves_the_checkpoint_before(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    """ENOSPC and EIO by a library in front of libc, so that the writes of safetensors, which is no Python, fail too."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    source, library = Path(__file__).parents[1] / "support" / "failing.c", tmp_path / "failing.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    start(make("training.keep_checkpoints=3"), tmp_path / "whole", quiet=True)
    (tmp_path / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.failing_saves", str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.strip())
