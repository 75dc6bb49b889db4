"""Runs that are killed, double or diverged: nothing is lost, and nothing is silently another number."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.config.text import dump
from sparsae.errors import DivergedError, InputError
from sparsae.evaluate.loading import load_run
from sparsae.files import is_temporary
from sparsae.report.page import write_report
from sparsae.runs.claim import claimed
from sparsae.runs.directory import RunDirectory, describe
from sparsae.runs.lock import locked
from sparsae.train.loop import Trainer
from sparsae.train.passes import Passes
from sparsae.train.run import resume, start
from tests.runs.conftest import Make
from tests.support.faults import not_finite
from tests.support.rundir import Killed, assert_same_run, killed_at
from tests.support.runs import contents, rows


class TestDivergence:
    def test_a_diverged_run_keeps_what_it_measured_and_says_where(
        self, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(DivergedError, match=r"diverged.*training\.learning_rate.*set training\.clip"):
            start(make("training.learning_rate=1e30", "training.clip=null"), run, quiet=True)
        assert not list((run / "checkpoints").glob("*"))
        assert resolve(run / "config.yaml").training.learning_rate == 1e30
        assert rows(run)[0]["kind"] == "validation"
        last = rows(run)[-1]
        assert last["kind"] == "diverged"
        known = describe(run)
        assert not known["finished"]
        assert known["diverged"]["step"] == known["steps"] == last["step"]
        assert known["diverged"]["reason"] == last["reason"]
        page = write_report(run).read_text()
        assert f"diverged after step {last['step']}" in page
        assert main(["info", str(run)]) == 0
        assert "diverged.step" in capsys.readouterr().out

    def test_the_command_writes_the_report(
        self, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start_at = tmp_path / "config.yaml"
        start_at.write_text(dump(make("training.learning_rate=1e30")))
        assert main(["train", str(start_at), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert "training.clip (now 1)" in error.splitlines()[-1]
        assert (tmp_path / "run" / "report.html").is_file()

    @pytest.mark.parametrize("what", ["parameter", "moment", "gradient"])
    def test_no_checkpoint_of_what_is_not_finite_replaces_a_good_one(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        run = tmp_path / "run"

        def spoil(trainer: Trainer) -> None:
            weight = dict(trainer.model.named_parameters())["transformer.wpe.weight"]
            if what == "parameter":
                weight.data[0, 0] = math.nan
            elif what == "moment":
                trainer.optimizer.state[weight]["exp_avg_sq"][0, 0] = math.inf
            else:
                weight.register_hook(lambda gradient: gradient * math.nan)

        killed_at(monkeypatch, 8, spoil)
        with pytest.raises(DivergedError, match=r"not finite|is nan") as caught:
            start(
                make("training.checkpoint_every=4", "training.validate_every=100", "training.skip_limit=0"),
                run,
                quiet=True,
            )
        assert caught.value.step == 8
        if what != "gradient":
            assert "transformer.wpe.weight" in str(caught.value)
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        # The gradient is bad after a step that was saved; the others are when it is about to be.
        assert kept == ["step-00000008" if what == "gradient" else "step-00000004"]
        model = load_run(run).model
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


class TestSkipped:
    @pytest.mark.parametrize("what", ["loss", "gradient", "teacher"])
    def test_a_bad_batch_changes_no_weight_and_is_told(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        steps, seen = Trainer.stepping, {}

        def stepping(self: Trainer) -> Passes[None]:
            yield from steps(self)
            moments = [self.optimizer.state[p]["exp_avg"] for p in self.model.parameters()]
            average = self.teacher.model.parameters()
            seen[self.step] = [p.detach().clone() for p in (*self.model.parameters(), *moments, *average)]

        monkeypatch.setattr(Trainer, "stepping", stepping)
        settings = ("training.log_every=1", "topology.every=7")
        with not_finite(what, {5, 6, 9}):
            summary = start(make(*settings), tmp_path / "run", quiet=True)
            with monkeypatch.context() as patch:
                killed_at(patch, 7)
                with pytest.raises(Killed):
                    start(make(*settings, "training.checkpoint_every=6"), tmp_path / "killed", quiet=True)
            resume(tmp_path / "killed", quiet=True)
        assert (summary["finished"], summary["steps_skipped"]) == (True, 3)
        for step, kept in ((5, True), (6, True), (7, False), (8, False), (9, True), (10, False)):
            same = [torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=False) if a.shape == b.shape]
            assert all(same) if kept else not any(same), step
        skipped = [row for row in rows(tmp_path / "run") if row["kind"] == "skipped"]
        assert [row["step"] for row in skipped] == [5, 6, 9]
        reasons = {"loss": "the loss is nan", "gradient": "the gradient's norm is nan", "teacher": "the loss is inf"}
        assert {row["reason"] for row in skipped} == {reasons[what]}
        losses = {row["step"]: row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"}
        assert [step for step, loss in losses.items() if loss is None] == [5, 6, 9]
        assert (
            "Steps skipped because a loss or a gradient was not finite: 3."
            in write_report(tmp_path / "run").read_text()
        )
        assert_same_run(tmp_path / "killed", tmp_path / "run")

    def test_too_many_in_a_row_end_the_run_and_leave_its_checkpoint(self, make: Make, tmp_path: Path) -> None:
        run = tmp_path / "run"
        settings = ("training.checkpoint_every=3", "training.skip_limit=2", "training.validate_every=100")
        with (
            not_finite("loss", {2, 3, 5, 6, 7, 8, 9}),
            pytest.raises(DivergedError, match="the loss is nan after step 6") as told,
        ):
            start(make(*settings), run, quiet=True)
        assert told.value.step == 6
        assert [row["step"] for row in rows(run) if row["kind"] == "skipped"] == [2, 3, 5, 6]
        assert describe(run)["diverged"] == {"step": 6, "reason": "the loss is nan"}
        assert resume(run, quiet=True)["steps_skipped"] == 4


class TestKilled:
    def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
        self, make: Make, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed_at(monkeypatch, 7)
        for way in ("resume", "out"):
            run = tmp_path / way
            with pytest.raises(Killed):
                start(make(), run, quiet=True)
            assert rows(run)[-1]["step"] == 6
        monkeypatch.undo()
        (tmp_path / "resume" / "notes.txt").write_text("mine")
        assert resume(tmp_path / "resume", quiet=True)["finished"]
        assert (tmp_path / "resume" / "notes.txt").read_text() == "mine"
        with pytest.raises(InputError, match="other settings"):
            start(make("seed=1"), tmp_path / "out", quiet=True)
        assert start(make(), tmp_path / "out", quiet=True)["finished"]
        for way in ("resume", "out"):
            assert_same_run(tmp_path / way, unbroken)

    def test_what_is_left_of_a_manifest_that_was_being_written_keeps_nobody_out(
        self, make: Make, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        run.mkdir()
        (run / ".manifest.json.0123456789abcdef.tmp").write_text("{")
        assert start(make("training.steps=2"), run, quiet=True)["finished"]
        assert not list(run.glob(".manifest*"))

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.parametrize("after", ["manifest", "config", "tokenizer"])
    def test_a_run_that_was_killed_while_it_began_begins_again(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
    ) -> None:
        from sparsae.data import Tokenizer
        from sparsae.runs.manifest import Manifest

        owner, name = {
            "manifest": (Manifest, "write_config"),
            "config": (Tokenizer, "save"),
            "tokenizer": (Manifest, "with_tokenizer"),
        }[after]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *arguments: os._exit(9))
            if os.fork() == 0:
                start(make("training.steps=2"), tmp_path / "run", quiet=True)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        if after == "manifest":
            assert start(make("training.steps=2"), tmp_path / "run", quiet=True)["finished"]
        else:
            assert resume(tmp_path / "run", quiet=True)["finished"]

    def test_checkpoints_come_by_time_and_change_no_number(
        self, make: Make, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert make().training.checkpoint_minutes == 5.0
        config = make("training.checkpoint_minutes=1e-9")
        killed_at(monkeypatch, 11)
        with pytest.raises(Killed):
            start(config, tmp_path / "run", quiet=True)
        monkeypatch.undo()
        assert RunDirectory(tmp_path / "run").saved_steps() == [10]
        resume(tmp_path / "run", quiet=True)
        assert_same_run(tmp_path / "run", unbroken)

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
    def test_signals_save_and_resume_finishes(
        self, make: Make, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        number = getattr(signal, name)
        killed_at(monkeypatch, 5, lambda trainer: os.kill(os.getpid(), number))
        outside = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have ignored it, as nohup does
        try:
            stopped = start(make(), tmp_path / "run", quiet=True)
            assert (stopped["finished"], stopped["steps"]) == (False, 5)
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, outside)
        monkeypatch.undo()
        resume(tmp_path / "run", quiet=True)
        assert_same_run(tmp_path / "run", unbroken)

    def test_a_hangup_that_is_ignored_stays_ignored(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        try:
            killed_at(monkeypatch, 5, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
            assert start(make(), tmp_path / "run", quiet=True)["finished"]
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_leftovers_neither_stop_a_run_nor_stay(self, make: Make, unbroken: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        config = make("training.checkpoint_every=4", "training.keep_checkpoints=2")
        start(config, run, quiet=True)
        (run / "summary.json").unlink()
        checkpoints = run / "checkpoints"
        (checkpoints / "step-00000012" / "state.json").unlink()  # the newest one is torn
        (checkpoints / "step-00000002").mkdir()
        (checkpoints / ".step-00000007.0123456789abcdef.partial").mkdir()
        (run / ".summary.json.0123456789abcdef.tmp").write_text("{")
        (checkpoints / "step-00000008-mine").mkdir()
        (run / "tokenizer" / ".tokenizer.json.0123456789abcdef.tmp").write_text("{")
        assert resume(run, quiet=True)["finished"]
        names = {path.name for path in checkpoints.iterdir()}
        assert names == {"step-00000008", "step-00000012", "step-00000008-mine"}
        assert not [path for path in run.rglob("*") if is_temporary(path)]
        assert_same_run(run, unbroken)

    def test_a_run_that_was_killed_before_its_sample_gets_it_and_its_report(self, finished: Path) -> None:
        assert main(["train", "--resume", str(finished)]) == 0
        assert (finished / "sample.json").is_file()
        assert (finished / "report.html").is_file()
        (finished / "report.html").unlink()
        assert main(["train", "--resume", str(finished)]) == 0
        assert (finished / "report.html").is_file()
        assert main(["train", "--resume", str(finished)]) == 2


class TestOneProcess:
    def test_a_run_that_somebody_works_on_is_refused(self, make: Make, finished: Path) -> None:
        before = contents(finished)
        with (
            locked(finished, "this run"),
            pytest.raises(InputError, match=rf"another process.*process {os.getpid()} on"),
        ):
            resume(finished, quiet=True, steps=20)
        del before["manifest.json"]
        after = contents(finished)
        assert all(after[name] == content for name, content in before.items())

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_dead_process_keeps_nobody_out(self, tmp_path: Path) -> None:
        if os.fork() == 0:
            with locked(tmp_path, "this run"):
                os.kill(os.getpid(), signal.SIGKILL)
        os.wait()
        with claimed(tmp_path):
            pass

    def test_ranks_without_a_launcher_are_refused_and_write_nothing(
        self,
        make: Make,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK is not set: start the ranks by torchrun"):
            start(make(), tmp_path / "new", quiet=True)
        assert main(["train", "--out", str(tmp_path / "new")]) == 2
        assert main(["train", "--resume", str(finished), "--steps", "20"]) == 2
        assert "WORLD_SIZE" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
