"""Kills, signals, full disks and no memory in runs of two ranks: each ends all of them, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.runs.checkpoint import load_checkpoint
from sparsae.runs.directory import RunDirectory
from sparsae.train.loop import Trainer
from sparsae.train.passes import Passes
from sparsae.train.run import resume, start
from tests.soak.conftest import SAVED, Make
from tests.support.faults import failing_disk, in_child, ranks_in_children
from tests.support.runs import rows, weights

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]

_FAILING = ExitStack()  # of a process that ends with it


@pytest.fixture(scope="module")
def unbroken(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run of two ranks, and how long it took."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    start(make(*SAVED), folder / "warm", quiet=True)  # the cache, and what is imported late
    began = time.perf_counter()
    codes, told = ranks_in_children(lambda: start(make(*SAVED), folder / "run", quiet=True))
    assert codes == [0, 0], told
    return folder / "run", time.perf_counter() - began


def finish(run: Path, config: Config) -> None:
    """As a person would, on two ranks: resume what is there, or begin."""
    if (summary := RunDirectory(run).read_summary()) and summary.finished:
        return
    go = (lambda: resume(run, quiet=True)) if RunDirectory(run).begun() else (lambda: start(config, run, quiet=True))
    codes, told = ranks_in_children(go)
    assert codes == [0, 0], told


def assert_same(run: Path, whole: Path) -> None:
    assert rows(run) == rows(whole)
    assert weights(run) == weights(whole)


@pytest.mark.parametrize("seed", range(int(os.environ.get("SPARSAE_KILLS_OF_RANKS", "50"))))
def test_kills(make: Make, unbroken: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    """SIGKILL for the first rank, the second, or both, at a random instant."""
    whole, seconds = unbroken
    rng, run, config = random.Random(seed), tmp_path / "run", make(*SAVED)
    victims = ((0,), (1,), (0, 1))[seed % 3]
    codes, told = ranks_in_children(
        lambda: start(config, run, quiet=True), after=rng.uniform(0.0, 1.1 * seconds), victims=victims
    )
    for rank in {0, 1} - set(victims):
        if codes[rank]:  # it had not finished
            assert codes[rank] == 1, told
            assert "\n" not in told[rank]
            assert f"rank {victims[0]} has ended" in told[rank], told
    finish(run, config)
    assert_same(run, whole)


def test_a_checkpoint_serves_any_number_of_ranks(make: Make, tmp_path: Path) -> None:
    """Two ranks, then four, then one: the loss of one rank throughout, to rounding, and the same order of the data."""
    overrides = ("training.batch_size=4", "training.log_every=1", "teacher.enabled=true")
    start(make(*overrides, "training.steps=12"), tmp_path / "one", quiet=True)
    run, config = tmp_path / "run", make(*overrides, "training.steps=12")

    def stopping(step: int) -> Callable[[], None]:
        whole = Trainer.stepping

        def stepping(self: Trainer) -> Passes[None]:
            yield from whole(self)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        def patch() -> None:
            Trainer.stepping = stepping  # type: ignore[method-assign]

        return patch

    for count, step, go in ((2, 4, lambda: start(config, run, quiet=True)), (4, 8, lambda: resume(run, quiet=True))):
        codes, told = ranks_in_children(go, count, spoil={count - 1: stopping(step)})
        assert codes == [0] * count, told
        assert RunDirectory(run).saved_steps() == [step]
    resume(run, quiet=True)
    found, expected = rows(run), rows(tmp_path / "one")
    assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4), mine["step"]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_memory_on_a_rank_ends_both_with_a_line(make: Make, tmp_path: Path, rank: int) -> None:
    whole = Trainer.stepping

    def stepping(self: Trainer) -> Passes[None]:
        if self.step == 7:
            torch.empty(2**58)
        yield from whole(self)

    def greedy() -> None:
        Trainer.stepping = stepping  # type: ignore[method-assign]

    run = tmp_path / "run"
    codes, told = ranks_in_children(lambda: start(make(*SAVED), run, quiet=True), spoil={rank: greedy})
    assert (codes[rank], codes[1 - rank]) == (2, 1)
    assert "training does not fit into memory" in told[rank]
    assert told[1 - rank].startswith(f"rank {rank} ended: training does not fit into memory")
    assert all("\n" not in line for line in told)
    assert RunDirectory(run).saved_steps() == [5]


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_launcher_the_rank_that_ended_is_named_too(make: Make, tmp_path: Path, rank: int) -> None:
    whole = Trainer.stepping

    def stepping(self: Trainer) -> Passes[None]:
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from whole(self)

    def doomed() -> None:
        Trainer.stepping = stepping  # type: ignore[method-assign]

    codes, told = ranks_in_children(
        lambda: start(make(*SAVED), tmp_path / "run", quiet=True), spoil={rank: doomed}, launcher=False
    )
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    assert told[1 - rank].startswith(f"rank {rank}")
    assert "\n" not in told[1 - rank]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_ends_both_with_a_line(make: Make, unbroken: tuple[Path, float], tmp_path: Path, call: str) -> None:
    run, config = tmp_path / "run", make(*SAVED)
    assert in_child(lambda: start(make(*SAVED, "training.steps=2"), tmp_path / "other", quiet=True)) == 0

    def full() -> None:
        whole = Trainer.stepping

        def stepping(self: Trainer) -> Passes[None]:
            yield from whole(self)
            if self.step == 7:
                _FAILING.enter_context(failing_disk(call, 1))

        Trainer.stepping = stepping  # type: ignore[method-assign]

    codes, told = ranks_in_children(lambda: start(config, run, quiet=True), spoil={0: full})
    assert codes == [2, 1], told
    assert "No space left on device" in told[0]
    assert told[1].startswith("rank 0 ended: ")
    assert "No space left on device" in told[1]
    load_checkpoint(RunDirectory(run).latest_checkpoint())
    finish(run, config)
    assert_same(run, unbroken[0])


def test_mixed_faults_change_nothing(make: Make, tmp_path: Path) -> None:
    """2,000 steps over two ranks with 30 faults: the same rows and tensors as the undisturbed run."""
    steps, faults = (int(os.environ.get(f"SPARSAE_SOAK_{name}", n)) for name, n in (("STEPS", 2000), ("FAULTS", 30)))
    config = make(f"training.steps={steps}", "training.checkpoint_every=40", "training.keep_checkpoints=2",
                  "training.validate_every=500", "training.checkpoint_async=true")  # fmt: skip
    codes, told = ranks_in_children(lambda: start(config, tmp_path / "whole", quiet=True))
    assert codes == [0, 0], told
    run, rng, happened = tmp_path / "run", random.Random(1), []

    def at(step: int, act: Callable[[], object]) -> Callable[[], None]:
        def patch() -> None:
            whole = Trainer.stepping

            def stepping(self: Trainer) -> Passes[None]:
                yield from whole(self)
                if self.step == step:
                    act()

            Trainer.stepping = stepping  # type: ignore[method-assign]

        return patch

    def no_memory() -> None:
        torch.empty(2**58)

    acts: dict[str, Callable[[], object]] = {
        "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
        "no memory": no_memory,
        "full disk": lambda: _FAILING.enter_context(failing_disk("fsync", 1)),
        "broken disk": lambda: _FAILING.enter_context(failing_disk("replace", 1)),
    }
    for number in range(faults):
        name = list(acts)[number % len(acts)]
        done = max(RunDirectory(run).saved_steps(), default=0)
        step = rng.randint(done + 1, max(done + 1, min(steps - 1, (number + 1) * steps // faults)))
        rank = 0 if "disk" in name else rng.randrange(2)
        go = (
            (lambda: resume(run, quiet=True)) if RunDirectory(run).begun() else (lambda: start(config, run, quiet=True))
        )
        codes, told = ranks_in_children(go, spoil={rank: at(step, acts[name])})
        happened.append((name, rank, step, codes))
        if name in ("SIGTERM", "SIGUSR1"):
            assert codes == [0, 0], told
        else:
            assert codes[1 - rank] == 1, (name, told)
        if number % 10 == 9:  # and what a person, or a disk, may do between two attempts
            saved = RunDirectory(run).saved_steps()
            if len(saved) > 1:
                newest = RunDirectory(run).checkpoint(saved[-1])
                (newest / "model.safetensors").write_bytes(b"")
                with pytest.raises(InputError, match="damaged"):
                    in_this_process(run)
                shutil.rmtree(newest)
    finish(run, config)
    assert_same(run, tmp_path / "whole")
    print(f"{len(happened)} faults in {steps} steps: {happened}")


def in_this_process(run: Path) -> None:
    load_checkpoint(RunDirectory(run).latest_checkpoint())
