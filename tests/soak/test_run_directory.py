"""Hundreds of things that happen to runs: whatever it is, it is found, and every run can be resumed to the same end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.evaluate.generation import write_sample
from sparsae.report.page import write_report
from sparsae.runs.directory import RunDirectory
from sparsae.train.run import resume, start
from sparsae.train.stopping import STOP_SIGNALS
from tests.soak.conftest import SAVED, Make
from tests.support.faults import assert_found_or_without_effect, damage, failing_disk, in_child, killed_in_a_save, seen
from tests.support.runs import contents, rows, weights

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]


@pytest.fixture(scope="module")
def unbroken(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run, and how long it took."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    start(make(*SAVED), folder / "warm", quiet=True)
    began = time.perf_counter()
    start(make(*SAVED), folder / "run", quiet=True)
    return folder / "run", time.perf_counter() - began


@pytest.fixture(scope="module", params=["finished", "stopped"])
def subject(
    request: pytest.FixtureRequest, make: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path, int]:
    """A run to damage, the same of another seed, where it ends, and its steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    for name, seed in (("run", 0), ("other", 1), ("end", 0)):
        start(make(*SAVED, f"seed={seed}"), folder / name, quiet=True)
    steps = 12
    if request.param == "finished":
        steps = 20
        resume(folder / "end", quiet=True, steps=steps)
        for name in ("run", "other"):
            write_sample(folder / name)
            write_report(folder / name)
    else:  # killed after its checkpoint of step 10
        for name in ("run", "other"):
            shutil.rmtree(folder / name / "checkpoints" / "step-00000012")
            (folder / name / "summary.json").unlink()
    return folder / "run", folder / "other", folder / "end", steps


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_found_or_without_effect(subject: tuple[Path, Path, Path, int], tmp_path: Path, seed: int) -> None:
    whole, other, end, steps = subject
    before = seen(whole)
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    told = damage(run, other, random.Random(seed))
    assert_found_or_without_effect(run, told, before, end, steps)


def test_a_checkpoint_of_another_run_is_found(subject: tuple[Path, Path, Path, int], tmp_path: Path) -> None:
    whole, other, _, steps = subject
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    with pytest.raises(InputError, match="another run"):
        resume(run, quiet=True, steps=steps)


def test_every_cut_of_the_settings_is_found_or_without_effect(
    subject: tuple[Path, Path, Path, int], tmp_path: Path
) -> None:
    run = RunDirectory(Path(shutil.copytree(subject[0], tmp_path / "run")))
    whole, config = run.config_file.read_bytes(), run.config()
    found = 0
    for end in range(len(whole)):
        run.config_file.write_bytes(whole[:end])
        try:
            assert run.config() == config
        except InputError:
            found += 1
    assert found > 0.9 * len(whole)


def finish(run: Path, config: Config) -> None:
    """As a person would: resume what is there, or begin."""
    if RunDirectory(run).begun():
        try:
            resume(run, quiet=True)
        except InputError as error:
            if "is finished" not in str(error):
                raise
    else:
        start(config, run, quiet=True)


def assert_same(run: Path, unbroken: Path) -> None:
    assert rows(run) == rows(unbroken)
    assert weights(run) == weights(unbroken)
    assert not [name for name in contents(run) if ".tmp" in name or ".partial" in name]
    assert (run / "notes.txt").read_text() == "mine"


_INSIDE: list[bool] = []  # of each kill, whether it came inside a save


@pytest.mark.parametrize("seed", range(int(os.environ.get("SPARSAE_KILLS", "200"))))
def test_kills(make: Make, unbroken: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    """Two of three inside a save, at a random instant of one of the first saves; every second run saves by a thread."""
    whole, seconds = unbroken
    beside = "true" if seed % 2 else "false"
    rng, run = random.Random(seed), tmp_path / "run"
    config = make(*SAVED, f"training.checkpoint_async={beside}")
    if seed % 3:
        _INSIDE.append(killed_in_a_save(lambda: start(config, run, quiet=True), rng.randrange(1, 4), rng.random()))
    else:
        _INSIDE.append(False)
        in_child(lambda: start(config, run, quiet=True), after=rng.uniform(0.0, 1.3 * seconds))
    run.mkdir(exist_ok=True)
    notes = run / "notes.txt"
    if RunDirectory(run).begun():  # an empty directory with notes in it is nobody's to take
        notes.write_text("mine")
        for _ in range(rng.randrange(3)):
            in_child(lambda: resume(run, quiet=True), after=rng.uniform(0.0, seconds))
    finish(run, config)
    notes.write_text("mine")
    assert_same(run, whole)


def test_half_of_the_kills_came_inside_a_save() -> None:
    assert sum(_INSIDE) >= len(_INSIDE) // 2
    print(f"{len(_INSIDE)} SIGKILLs, {sum(_INSIDE)} inside a save")


@pytest.mark.parametrize("seed", range(20))
def test_signals(make: Make, unbroken: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    whole, seconds = unbroken
    rng, run, config = random.Random(seed), tmp_path / "run", make(*SAVED)
    number = STOP_SIGNALS[seed % len(STOP_SIGNALS)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    in_child(lambda: start(config, run, quiet=True), after=rng.uniform(0.0, 1.3 * seconds), number=number)
    signal.signal(signal.SIGINT, before)
    run.mkdir(exist_ok=True)
    finish(run, config)
    (run / "notes.txt").write_text("mine")
    assert_same(run, whole)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
@pytest.mark.parametrize("call", ["fsync", "write", "replace"])
def test_disk_faults(make: Make, unbroken: tuple[Path, float], tmp_path: Path, call: str, count: int) -> None:
    whole, _ = unbroken
    run, config = tmp_path / "run", make(*SAVED)
    with failing_disk(call, count) as failed:
        told: InputError | OSError | None = None
        try:
            start(config, run, quiet=True)
        except (InputError, OSError) as error:
            told = error
    assert failed() == (told is not None)
    assert not isinstance(told, OSError) or told.filename
    finish(run, config)
    (run / "notes.txt").write_text("mine")
    assert_same(run, whole)


@pytest.mark.parametrize("seed", range(10))
def test_double_starts(make: Make, unbroken: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    whole, seconds = unbroken
    rng, run, config = random.Random(seed), tmp_path / "run", make(*SAVED)
    go = lambda: start(config, run, quiet=True)  # noqa: E731
    if seed % 2:
        in_child(go, after=0.6 * seconds)
        go = lambda: finish(run, config)  # noqa: E731
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(in_child, go)
        time.sleep(rng.uniform(0.0, 0.5 * seconds))
        second = pool.submit(in_child, go)
        codes = sorted([first.result(), second.result()])
    assert codes in ([0, 2], [0, 0])  # one was refused, or found the other's work done
    (run / "notes.txt").write_text("mine")
    assert_same(run, whole)
