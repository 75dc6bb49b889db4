"""Runs that are killed, double, full, damaged or diverged: nothing is lost, and nothing is silently another number."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsae.cli import main
from sparsae.config import Config
from sparsae.config.load import dump, resolve
from sparsae.errors import DivergedError, InputError
from sparsae.evaluate.generation import generate_text
from sparsae.evaluate.loading import load_run
from sparsae.files import read_json, sealed, sha256_of, write_atomically
from sparsae.report.page import write_report
from sparsae.train import run as run_module
from sparsae.train.claim import claimed
from sparsae.train.lock import locked
from sparsae.train.loop import Trainer
from sparsae.train.run import resume, start
from sparsae.train.rundir import RunDirectory, describe
from tests.faults import damage, failing_disk, in_child, seen
from tests.runs import config_of, contents, rows, weights, write_text

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    cache = tmp_path_factory.mktemp("cache")
    return lambda *overrides, method="sparsae": config_of(text, cache, *overrides, method=method)


@pytest.fixture(scope="module")
def unbroken(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing happened to."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "run"
    start(make(), path, quiet=True)
    return path


@pytest.fixture(scope="module")
def other(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of another seed."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "other"
    start(make("seed=1"), path, quiet=True)
    return path


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


class Killed(BaseException):
    """As if the process ended here: nothing that comes after it may be needed."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Trainer], None] | None = None) -> None:
    whole = Trainer.train_step

    def train_step(self: Trainer) -> None:
        whole(self)
        if self.step == step:
            if act is None:
                raise Killed
            act(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert weights(one) == weights(other)


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
        assert f"diverged at step {last['step']}" in page
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
            start(make("training.checkpoint_every=4", "training.validate_every=100"), run, quiet=True)
        assert caught.value.step == 8
        if what != "gradient":
            assert "transformer.wpe.weight" in str(caught.value)
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        # The gradient is bad after a step that was saved; the others are when it is about to be.
        assert kept == ["step-00000008" if what == "gradient" else "step-00000004"]
        model = load_run(run).model
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


class TestWhatIsNotOurs:
    def test_an_error_before_the_first_row_removes_what_the_run_made_and_nothing_else(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "new" / "run"

        def fail(*arguments: object) -> None:
            raise InputError("a tracker cannot start")

        monkeypatch.setattr(run_module, "Trackers", fail)
        with pytest.raises(InputError, match="cannot start"):
            start(make(), out, quiet=True)
        assert not (tmp_path / "new").exists()

        def fail_later(*arguments: object) -> None:
            (out / "notes.txt").write_text("mine")
            (out / "tokenizer" / "notes.txt").write_text("mine too")
            raise InputError("a tracker cannot start")

        monkeypatch.setattr(run_module, "Trackers", fail_later)
        with pytest.raises(InputError, match="cannot start"):
            start(make(), out, quiet=True)
        assert contents(out) == {"notes.txt": b"mine", "tokenizer/notes.txt": b"mine too"}

    def test_an_error_in_a_directory_that_was_there_leaves_it(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        with pytest.raises(InputError, match="/nowhere"):
            start(make("data.source=/nowhere/*.txt"), tmp_path / "run", quiet=True)
        assert list((tmp_path / "run").iterdir()) == []

    def test_planted_links_are_not_followed(self, finished: Path, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("precious")
        run = RunDirectory(finished)
        for name in (".summary.json.tmp", ".report.html.tmp", ".config.yaml.tmp"):
            (finished / name).symlink_to(victim)
        run.summary.unlink()
        run.summary.symlink_to(victim)
        run.write_json("summary.json", {"steps": 1})
        write_report_into = finished / "report.html"
        write_atomically(write_report_into, "page")
        run.metrics.rename(tmp_path / "metrics")
        run.metrics.symlink_to(victim)
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            run_module.MetricsWriter(run.metrics)
        assert victim.read_text() == "precious"

    def test_a_checkpoint_of_another_run_in_the_way_is_put_aside(
        self, make: Make, finished: Path, tmp_path: Path
    ) -> None:
        start(make("seed=5", "training.checkpoint_every=6"), tmp_path / "other", quiet=True)
        shutil.rmtree(finished / "checkpoints")
        (finished / "summary.json").unlink()
        theirs = Path(shutil.copytree(tmp_path / "other" / "checkpoints", finished / "checkpoints")) / "step-00000012"
        with pytest.raises(InputError, match="another run"):
            resume(finished, quiet=True)
        with pytest.raises(InputError, match="another run"):
            load_run(finished)
        before = contents(theirs)
        from sparsae.train.checkpoint import save_checkpoint

        save_checkpoint(theirs, {}, {"run": "ours"})
        (aside,) = theirs.parent.glob("step-00000012-found-*")
        assert contents(aside) == before


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
        from sparsae.train.manifest import Manifest

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
        before = signal.getsignal(number)
        stopped = start(make(), tmp_path / "run", quiet=True)
        assert (stopped["finished"], stopped["steps"]) == (False, 5)
        assert signal.getsignal(number) is before
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
        assert resume(run, quiet=True)["finished"]
        names = {path.name for path in checkpoints.iterdir()}
        assert names == {"step-00000008", "step-00000012", "step-00000008-mine"}
        assert not (run / ".summary.json.0123456789abcdef.tmp").exists()
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

    def test_several_ranks_are_refused_and_write_nothing(
        self,
        make: Make,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="without torchrun"):
            start(make(), tmp_path / "new", quiet=True)
        assert main(["train", "--out", str(tmp_path / "new")]) == 2
        assert main(["train", "--resume", str(finished), "--steps", "20"]) == 2
        assert "WORLD_SIZE" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


class TestDamage:
    def test_changed_settings_are_named(self, finished: Path) -> None:
        file = finished / "config.yaml"
        whole = file.read_text()
        (finished / "summary.json").unlink()
        for old, new, told in (
            ("seed: 0", "seed: 1", "seed is 1, not 0"),
            ("learning_rate: 0.002", "learning_rate: 0.02", r"training\.learning_rate is 0\.02, not 0\.002"),
            ("heads: 2", "heads: 4", r"model\.heads is 4, not 2"),
            ("steps: 12", "steps: 24", r"training\.steps is 24, not 12"),
        ):
            assert old in whole
            file.write_text(whole.replace(old, new, 1))
            for use in (resume, load_run, write_report, describe):
                with pytest.raises(InputError, match=told):
                    use(finished)
        file.write_text(f"# my remark\n{whole}")
        assert describe(finished)["seed"] == 0

    @pytest.mark.slow
    def test_every_cut_of_the_settings_is_found_or_has_no_effect(self, finished: Path) -> None:
        run, file = RunDirectory(finished), finished / "config.yaml"
        whole, config = file.read_bytes(), run.config()
        for end in range(0, len(whole), 7):
            file.write_bytes(whole[:end])
            told = ""
            try:
                assert run.config() == config
            except InputError as error:
                told = str(error)
            assert not told or "config.yaml" in told

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_another_tokenizer_is_found(self, finished: Path, name: str) -> None:
        file = finished / "tokenizer" / name
        file.write_bytes(file.read_bytes().replace(b"e", b"a", 1))
        for use in (load_run, lambda run: generate_text(run, "item", 3), lambda run: resume(run, steps=20)):
            with pytest.raises(InputError, match=name):
                use(finished)

    def test_cut_or_changed_metrics_are_found(self, finished: Path) -> None:
        file, whole = finished / "metrics.jsonl", (finished / "metrics.jsonl").read_bytes()
        changed = whole.replace(b'"loss": ', b'"loss": 1', 1)
        for wrong in (b"", whole[: len(whole) // 2], changed, whole + whole[:100]):
            for summary in (True, False):
                if not summary:
                    (finished / "summary.json").rename(finished / "away")
                file.write_bytes(wrong)
                if summary or wrong[: len(whole)] != whole:
                    with pytest.raises(InputError, match=r"metrics\.jsonl"):
                        write_report(finished)
                if wrong[: len(whole)] != whole:
                    before = contents(finished)
                    with pytest.raises(InputError, match=r"metrics\.jsonl"):
                        resume(finished, quiet=True, steps=20)
                    assert contents(finished) == before | {".lock": contents(finished)[".lock"]}
                if not summary:
                    (finished / "away").rename(finished / "summary.json")

    @pytest.mark.parametrize("name", ["summary.json", "manifest.json", "checkpoints/step-00000012/state.json"])
    def test_a_changed_digit_is_found(self, finished: Path, name: str) -> None:
        file = finished / name
        content = bytearray(file.read_bytes())
        digits = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
        content[digits[len(digits) // 2]] ^= 1
        file.write_bytes(bytes(content))
        use = load_run if "checkpoints" in name else describe
        with pytest.raises(InputError, match=file.name):
            use(finished)

    def test_a_manifest_that_is_gone_is_missed(self, finished: Path) -> None:
        (finished / "manifest.json").unlink()
        for use in (resume, load_run, describe):
            with pytest.raises(InputError, match=r"manifest\.json: is missing"):
                use(finished)

    @pytest.mark.parametrize(
        ("group", "name", "change"),
        [
            ("model", "transformer.h.0.mlp.c_fc.indices", lambda t: t.flip(0)),
            ("model", "transformer.h.0.mlp.c_fc.indices", lambda t: t + 10**6),
            ("model", "transformer.h.0.mlp.c_fc.indices", lambda t: t.float()),
            ("model", "transformer.h.0.mlp.c_fc.values", lambda t: t[1:].clone()),
            ("model", "transformer.wpe.weight", lambda t: t.double()),
            ("model", "transformer.wpe.weight", lambda t: t[:3].clone()),
            ("teacher", "transformer.h.0.mlp.c_fc.indices", lambda t: t - 10**6),
            ("optimizer", "transformer.wpe.weight:exp_avg", lambda t: t[:3].clone()),
            ("optimizer", "transformer.wpe.weight:exp_avg", lambda t: None),
            ("search", "search/telemetry/birth/transformer.h.0.mlp.c_fc", lambda t: None),
        ],
    )
    def test_tensors_that_do_not_fit_are_named_though_their_file_is_whole(
        self, finished: Path, group: str, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> None:
        checkpoint = finished / "checkpoints" / "step-00000012"
        file = checkpoint / f"{group}.safetensors"
        tensors: dict[str, Any] = load_file(file)
        tensors[name] = change(tensors[name])
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
        state = read_json(checkpoint / "state.json")
        state["files"][file.name] = sha256_of(file)
        (checkpoint / "state.json").write_text(sealed(state))
        (finished / "summary.json").unlink()
        with pytest.raises(InputError) as caught:
            resume(finished, quiet=True)
        assert name.rpartition("/")[2].partition(":")[0] in str(caught.value)
        assert "step-00000012" in str(caught.value)

    @pytest.mark.parametrize("change", ["dtype", "order"])
    def test_a_corpus_whose_manifest_was_changed_is_made_again(
        self, text: Path, tmp_path: Path, unbroken: Path, change: str
    ) -> None:
        config = config_of(text, tmp_path / "cache")
        start(config, tmp_path / "first", quiet=True)
        (file,) = (tmp_path / "cache").glob("*/manifest.json")
        manifest = json.loads(file.read_text())
        if change == "dtype":
            manifest["dtype"] = "<u4"
        else:
            manifest["splits"]["train"]["shards"] = manifest["splits"]["validation"]["shards"]
        file.write_text(json.dumps(manifest))
        start(config, tmp_path / "again", quiet=True)
        assert_same_run(tmp_path / "again", unbroken)


class TestLonger:
    @pytest.mark.parametrize("method", ["sparsae", "rigl", "gmp", "magnitude", "dense"])
    def test_a_finished_run_is_trained_longer(
        self, make: Make, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        first = start(make(method=method), run, quiet=True)
        with pytest.raises(InputError, match="finished: all 12 steps"):
            resume(run, quiet=True)
        with pytest.raises(InputError, match="fewer than the 12"):
            resume(run, quiet=True, steps=11)
        before = rows(run)
        shutil.copytree(run, tmp_path / "broken")
        longer = resume(run, quiet=True, steps=52)
        assert longer["finished"]
        assert (longer["steps"], longer["nnz"]) == (52, first["nnz_target"])
        assert longer["extensions"] == [{"step": 12, "previous_steps": 12, "steps": 52}]
        after = rows(run)
        assert after[: len(before)] == before
        assert after[len(before)] == {
            "kind": "extended", "step": 12, "previous_steps": 12, "steps": 52, "warmup_steps": 1,
        }  # fmt: skip
        assert resolve(run / "config.yaml").training.steps == 52
        if method in ("sparsae", "rigl"):
            assert any(row["kind"] == "topology" and row["step"] > 12 for row in after)
        # Stopped on the way, and before its first step, it ends the same.
        killed_at(monkeypatch, 13)
        with pytest.raises(Killed):
            resume(tmp_path / "broken", quiet=True, steps=52)
        monkeypatch.undo()
        resume(tmp_path / "broken", quiet=True)
        assert_same_run(run, tmp_path / "broken")

    def test_the_rate_rises_again_over_one_percent_of_what_was_added(self, make: Make, tmp_path: Path) -> None:
        from sparsae.core.cadence import cosine_with_warmup

        run = tmp_path / "run"
        start(make("training.log_every=1", method="static"), run, quiet=True)
        resume(run, quiet=True, steps=312)
        rates = {row["step"]: row["learning_rate"] for row in rows(run) if row["kind"] == "train"}
        whole = {step: 2e-3 * cosine_with_warmup(step - 1, 312, 0.1, 0.1) for step in range(13, 313)}
        assert [rates[step] / whole[step] for step in (13, 14, 15, 16)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
        assert rates[312] == pytest.approx(2e-4)

    def test_a_crash_while_a_run_is_extended_leaves_one_that_goes_on(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sparsae.train.manifest import Manifest

        def die(*arguments: object) -> None:
            raise Killed

        shutil.copytree(finished, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "write_config", die)
            with pytest.raises(Killed):
                resume(finished, quiet=True, steps=20)
        assert resume(finished, quiet=True)["steps"] == 20
        assert resolve(finished / "config.yaml").training.steps == 20
        resume(tmp_path / "whole", quiet=True, steps=20)
        assert_same_run(finished, tmp_path / "whole")

    def test_an_older_checkpoint_than_the_extension_is_refused(self, make: Make, tmp_path: Path) -> None:
        run = tmp_path / "run"
        start(make("training.checkpoint_every=6", "training.keep_checkpoints=9"), run, quiet=True)
        resume(run, quiet=True, steps=20)
        for path in (run / "checkpoints").iterdir():
            if path.name != "step-00000006":
                shutil.rmtree(path)
        (run / "summary.json").unlink()
        with pytest.raises(InputError, match="older than step 12"):
            resume(run, quiet=True)


class TestFrom:
    def test_a_run_starts_from_anothers_weights_and_topology(
        self, make: Make, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "next"
        command = ["train", "--from", str(finished), "--out", str(out), "--steps", "6", "--set", "training.warmup=0.5"]
        assert main(command) == 0
        summary = read_json(out / "summary.json")
        assert summary["started_from"]["step"] == 12
        assert summary["steps"] == 6
        source = read_json(finished / "summary.json")
        assert summary["untrained_perplexity"] == pytest.approx(source["validation_perplexity"], rel=1e-6)
        config = resolve(out / "config.yaml")
        assert config.model == resolve(finished / "config.yaml").model
        assert config.data.tokenizer == str(finished / "tokenizer")

    @pytest.mark.parametrize("step", [0, 3])
    def test_it_needs_the_other_run_no_more(
        self, make: Make, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        config = make("training.steps=6", "training.checkpoint_every=3", f"data.tokenizer={finished / 'tokenizer'}")
        start(config, tmp_path / "whole", quiet=True, source=finished)
        killed_at(monkeypatch, step + 1)
        with pytest.raises(Killed):
            start(config, tmp_path / "broken", quiet=True, source=finished)
        monkeypatch.undo()
        assert RunDirectory(tmp_path / "broken").saved_steps() == [step]
        shutil.rmtree(finished / "checkpoints")
        resume(tmp_path / "broken", quiet=True)
        assert_same_run(tmp_path / "broken", tmp_path / "whole")

    @pytest.mark.parametrize(
        ("override", "told"),
        [
            ("model.width=64", r"model\.width is 32, not 64"),
            ("sparsity.sparsity=0.8", r"sparsity\.sparsity is 0\.9, not 0\.8"),
            ("data.tokenizer_vocab=290", "ok"),
            ("parameterization.name=mup", r"parameterization\.name is 'sp', not 'mup'"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, make: Make, finished: Path, tmp_path: Path, override: str, told: str
    ) -> None:
        config = make(override, "training.steps=1")
        if told == "ok":  # the other run's tokenizer is taken
            assert start(config, tmp_path / "next", quiet=True, source=finished)["finished"]
            return
        with pytest.raises(InputError, match=told):
            start(config, tmp_path / "next", quiet=True, source=finished)
        assert not (tmp_path / "next").exists()

    def test_another_tokenizer_is_refused(self, make: Make, finished: Path, text: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        start(make("data.tokenizer_vocab=299", "training.steps=1"), other, quiet=True)
        with pytest.raises(InputError, match="tokenizer is another one"):
            start(make(f"data.tokenizer={other / 'tokenizer'}"), tmp_path / "next", quiet=True, source=finished)


class TestFaults:
    """A few of what the soak suite does by the hundred."""

    @pytest.mark.parametrize("seed", range(8))
    def test_damage_is_found_or_without_effect(
        self, make: Make, unbroken: Path, other: Path, finished: Path, tmp_path: Path, seed: int
    ) -> None:
        before = seen(finished)
        told = damage(finished, other, random.Random(seed))
        for now, then in zip(seen(finished), before, strict=True):
            assert now == "refused" or repr(now) == repr(then), told

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
    def test_a_killed_run_goes_on(self, make: Make, unbroken: Path, tmp_path: Path, share: float) -> None:
        run, seconds = tmp_path / "run", read_json(unbroken / "summary.json")["seconds"]
        in_child(lambda: start(make("training.checkpoint_every=5"), run, quiet=True), after=share * seconds)
        if RunDirectory(run).begun():
            resume(run, quiet=True)
        else:
            start(make("training.checkpoint_every=5"), run, quiet=True)
        assert_same_run(run, unbroken)

    @pytest.mark.parametrize(("call", "count"), [("fsync", 3), ("fsync", 12), ("write", 2), ("replace", 4)])
    def test_a_full_disk_loses_nothing(self, make: Make, unbroken: Path, tmp_path: Path, call: str, count: int) -> None:
        run, config = tmp_path / "run", make("training.checkpoint_every=5")
        with failing_disk(call, count) as failed, pytest.raises((InputError, OSError)) as caught:
            start(config, run, quiet=True)
        assert failed()
        assert isinstance(caught.value, InputError) or caught.value.filename
        if RunDirectory(run).begun():
            resume(run, quiet=True)
        else:
            start(config, run, quiet=True)
        assert_same_run(run, unbroken)

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_one_of_two_starts_is_refused(self, make: Make, unbroken: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(in_child, lambda: start(make(), run, quiet=True)) for _ in range(2)]
        assert sorted(one.result() for one in both) == [0, 2]
        assert_same_run(run, unbroken)
