"""Runs whose directories are damaged, full or not ours: it is told, and nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsae.errors import InputError
from sparsae.evaluate.generation import generate_text
from sparsae.evaluate.loading import load_run
from sparsae.files import read_json, sealed, sha256_of, write_atomically
from sparsae.observers import OBSERVERS, Observer
from sparsae.report.page import write_report
from sparsae.runs.directory import RunDirectory, describe
from sparsae.runs.metrics import MetricsWriter
from sparsae.train.run import resume, start
from tests.runs.conftest import Make
from tests.support.faults import damage, failing_disk, in_child, seen
from tests.support.records import summary_of
from tests.support.rundir import assert_same_run
from tests.support.runs import config_of, contents


class TestWhatIsNotOurs:
    def test_an_error_before_the_first_row_removes_what_the_run_made_and_nothing_else(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "new" / "run"

        def fail(path: Path) -> Observer:
            raise InputError("a tracker cannot start")

        monkeypatch.setitem(OBSERVERS._entries, "failing", fail)
        config = make("tracking.observers=[failing]")
        with pytest.raises(InputError, match="cannot start"):
            start(config, out, quiet=True)
        assert not (tmp_path / "new").exists()

        def fail_later(path: Path) -> Observer:
            (out / "notes.txt").write_text("mine")
            (out / "tokenizer" / "notes.txt").write_text("mine too")
            raise InputError("a tracker cannot start")

        monkeypatch.setitem(OBSERVERS._entries, "failing", fail_later)
        with pytest.raises(InputError, match="cannot start"):
            start(config, out, quiet=True)
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
        run.write_summary(summary_of(steps=1))
        write_report_into = finished / "report.html"
        write_atomically(write_report_into, "page")
        run.metrics.rename(tmp_path / "metrics")
        run.metrics.symlink_to(victim)
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            MetricsWriter(run.metrics)
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
        from sparsae.runs.checkpoint import save_checkpoint

        save_checkpoint(theirs, {}, {"run": "ours"})
        (aside,) = theirs.parent.glob("step-00000012-found-*")
        assert contents(aside) == before


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
