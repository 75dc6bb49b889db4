"""Runs that get more steps, and runs that start from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.files import read_json
from sparsae.runs.directory import RunDirectory
from sparsae.train.run import resume, start
from tests.runs.conftest import Make
from tests.support.rundir import Killed, assert_same_run, killed_at
from tests.support.runs import rows


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
        from sparsae.core.cadence import rate_factor

        run = tmp_path / "run"
        start(make("training.log_every=1", method="static"), run, quiet=True)
        resume(run, quiet=True, steps=312)
        rates = {row["step"]: row["learning_rate"] for row in rows(run) if row["kind"] == "train"}
        whole = {step: 2e-3 * rate_factor(step - 1, 312, 0.1, 0.1) for step in range(13, 313)}
        assert [rates[step] / whole[step] for step in (13, 14, 15, 16)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
        assert rates[312] == pytest.approx(2e-4)

    def test_a_crash_while_a_run_is_extended_leaves_one_that_goes_on(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sparsae.runs.manifest import Manifest

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
        with pytest.raises(InputError, match="no such tokenizer"):
            start(make("data.tokenizer=/nowhere/typo"), tmp_path / "typo", quiet=True, source=finished)
        shutil.rmtree(finished)
        resume(tmp_path / "broken", quiet=True)
        assert evaluate_run(tmp_path / "broken")["tokens"]
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
