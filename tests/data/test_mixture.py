"""Several sources in one text: each has its share of any stretch, and prepares by itself."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.data import DataConfig
from sparsae.config.load import resolve, with_absolute_paths
from sparsae.config.schema import Config
from sparsae.data import Batches, Mixture, prepare
from sparsae.data.mixture import turn_of
from sparsae.errors import InputError
from sparsae.evaluate.generation import write_sample
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.train.run import resume, start
from tests.support.rundir import assert_same_run
from tests.support.runs import rows, stopped_at

weights = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5)


@given(weights, st.integers(0, 10**12), st.integers(1, 400))
def test_each_part_has_its_share_of_any_stretch_and_its_turns_are_counted(
    weights: list[float], first: int, length: int
) -> None:
    shares = Mixture.weighted([np.arange(1)] * len(weights), weights).shares
    taken = [turn_of(shares, place) for place in range(first, first + length)]
    for part, share in enumerate(shares):
        own = [turns for which, turns in taken if which == part]
        assert abs(len(own) - float(share) * length) < part + 2
        assert own == list(range(own[0], own[0] + len(own))) if own else True
    if not first:
        assert taken[0][1] == 0


def test_shares_are_exact_wherever_they_can_be() -> None:
    shares = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6))
    for first in range(0, 600, 6):
        taken = [turn_of(shares, place)[0] for place in range(first, first + 6)]
        assert sorted(taken) == [0, 0, 0, 1, 1, 2]


def test_batches_of_a_mixture_read_each_part_in_epochs_of_its_own() -> None:
    mixture = Mixture.weighted([np.arange(41), np.arange(1000, 1401)], [3, 1])
    batches = Batches(mixture, 4, 8, seed=5)
    read = torch.cat([batches.at(step) for step in range(10)])
    small, large = read[read[:, 0] < 1000], read[read[:, 0] >= 1000]
    assert (len(small), len(large)) == (60, 20)
    for epoch in range(6):  # ten windows of the small text, visited six times, in orders that differ
        assert sorted(small[10 * epoch : 10 * epoch + 10, 0].tolist()) == list(range(0, 40, 4))
    assert len({tuple(small[10 * epoch : 10 * epoch + 10, 0].tolist()) for epoch in range(6)}) == 6
    assert len(set(large[:, 0].tolist())) == 20
    again = Batches(mixture, 4, 8, seed=5)
    assert torch.equal(again.at(9), read[72:])
    assert not torch.equal(Batches(mixture, 4, 8, seed=6).at(0), read[:8])
    halves = [Batches(mixture, 4, 4, 5, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.at(9) for half in halves]), read[72:])
    assert torch.equal(Batches(Mixture.of(np.arange(41)), 4, 8, 5).at(3), Batches(np.arange(41), 4, 8, 5).at(3))


def test_a_text_that_is_read_has_the_shares_in_every_part() -> None:
    mixture = Mixture.weighted([np.zeros(60_000, int), np.ones(1_000_000, int)], [1, 2])
    read = mixture.read()
    assert len(read) == 180_000
    assert [read[start : start + 45_000].mean() for start in range(0, 180_000, 45_000)] == pytest.approx(
        [2 / 3] * 4, abs=0.02
    )
    short = Mixture.weighted([np.arange(10), np.arange(100, 105)], [1, 1]).read()
    assert short.tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of text, and a dataset in the form of the Hub's, whose rows have the text under another name."""
    import pyarrow
    from pyarrow import parquet

    plain, hub = tmp_path / "plain", tmp_path / "hub"
    plain.mkdir()
    (hub / "data").mkdir(parents=True)
    for i in range(30):
        (plain / f"{i}.txt").write_text("\n".join(f"item {j} of list {i} has {j % 7} parts" for j in range(60)))
    documents = [f"{i} red birds and {i % 4} green ones sit on wire {i}. " * 30 for i in range(40)]
    for split, part in (("train", documents), ("test", documents[:2])):
        parquet.write_table(pyarrow.table({"content": part}), hub / "data" / f"{split}-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: data/train-*}\n  - {split: test, path: data/test-*}\n---\n"
    )
    return plain, hub


def settings(folders: tuple[Path, Path], tmp_path: Path, weights: tuple[float, float] = (1, 3)) -> Config:
    plain, hub = folders
    one, other = weights
    sources = f"[{{source: {plain}, weight: {one}}}, {{source: 'hf:{hub}', weight: {other}, text_field: content}}]"
    return resolve(
        overrides=[
            f"data.sources={sources}", f"data.cache={tmp_path / 'cache'}", "data.tokenizer_vocab=300",
            "data.validation_share=0.1", "model.layers=1", "model.width=32", "model.heads=2", "model.context=32",
            "training.steps=12", "training.batch_size=4", "training.log_every=3", "training.validation_sequences=4",
            "training.device=cpu",
        ]
    )  # fmt: skip


class TestSeveralSources:
    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def test_they_share_a_tokenizer_and_their_held_out_text_has_their_weights(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        pytest.importorskip("datasets")
        config = settings(folders, tmp_path)
        corpus = prepare(config.data)
        assert isinstance(corpus.train, Mixture)
        assert corpus.train.shares == (Fraction(1, 4), Fraction(3, 4))
        texts = [corpus.tokenizer.decode(part[:200].tolist()) for part in corpus.train.parts]
        assert ("of list" in texts[0], "green ones" in texts[1]) == (True, True)
        assert corpus.train_counts.sum() == pytest.approx(len(corpus.train), rel=0.01)
        tokens = corpus.validation[:]
        assert len(tokens) < corpus.manifest["splits"]["validation"]["tokens"]
        assert f"; {len(tokens):,} are read" in corpus.held_out
        birds = corpus.tokenizer.decode(tokens.tolist()).count("green")
        assert birds > 2
        # Other weights need no text again once there is a tokenizer.
        before = sorted((tmp_path / "cache").iterdir())
        given = config.data.model_copy(update={"tokenizer": str(corpus.directory / "tokenizer")})
        other = settings(folders, tmp_path, (5, 1)).data.sources
        again = prepare(given.model_copy(update={"sources": other}))
        assert sorted((tmp_path / "cache").iterdir()) == before
        assert again.digest != corpus.digest == prepare(given).digest

    def test_a_run_goes_on_bit_for_bit_even_where_the_cache_is_gone(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        pytest.importorskip("datasets")
        import shutil

        config = settings(folders, tmp_path)
        start(config, tmp_path / "whole", quiet=True)
        with stopped_at(5):
            start(config, tmp_path / "run", quiet=True)
        shutil.rmtree(tmp_path / "cache")
        resume(tmp_path / "run", quiet=True)
        assert_same_run(tmp_path / "whole", tmp_path / "run")
        reported = evaluate_run(tmp_path / "run")
        assert reported["loss"] == pytest.approx(
            [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "validation"][-1], rel=0.2
        )
        write_sample(tmp_path / "run")
        (folders[1] / "data" / "train-00000-of-00001.parquet").write_bytes(
            (folders[1] / "data" / "test-00000-of-00001.parquet").read_bytes()
        )
        with pytest.raises(InputError, match="text has changed"):
            evaluate_run(tmp_path / "run")


def test_paths_of_several_sources_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    monkeypatch.chdir(tmp_path)
    given = "[{source: a.txt}, {source: 'hf:hub:default'}, {source: hf:org/name@main}, {source: stdlib}]"
    data = with_absolute_paths(resolve(overrides=[f"data.sources={given}"])).data
    assert [each.source for each in data.sources] == [
        f"{tmp_path}/a.txt", f"hf:{tmp_path}/hub:default", "hf:org/name@main", "stdlib",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data={source: a.txt, sources: [{source: b.txt}]}", "data.sources: source a.txt is given beside sources"),
        ("data.sources=[{source: b.txt}, {source: b.txt}]", "data.sources: sources has b.txt twice"),
        ("data.sources=[{source: b.txt, weight: 0}]", r"data.sources\[0\].weight: must be above 0"),
        ("data.sources=[{weight: 1}]", "source"),
        ("data.sources=b.txt", "data.sources: must be a list"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(overrides=[given])


def test_prepared_text_among_them_names_the_tokenizer_that_all_need(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"some lines of {name}\n" * 400)
    common = DataConfig(cache=str(tmp_path / "cache"), tokenizer_vocab=300, validation_share=0.1)
    ready = prepare(common.model_copy(update={"source": str(tmp_path / "a.txt")}))
    sources = f"data.sources=[{{source: {ready.directory}}}, {{source: {tmp_path}/b.txt}}]"
    several = resolve(overrides=[sources, f"data.cache={tmp_path / 'cache'}"]).data
    with pytest.raises(InputError, match=f"set data.tokenizer to {ready.directory}/tokenizer"):
        prepare(several)
    corpus = prepare(several.model_copy(update={"tokenizer": f"{ready.directory}/tokenizer"}))
    assert isinstance(corpus.train, Mixture)
    assert corpus.train.parts[0][:].tolist() == ready.train[:].tolist()  # type: ignore[index]


def test_a_shared_tokenizer_is_trained_on_each_source_by_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sources whose first documents are longer than their shares, too."""

    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(f"{letter * 4} " * 2000)
    seen: list[str] = []

    def trained(texts: Iterator[str], *_: object) -> str:
        seen.extend(texts)
        raise InputError("seen")

    for module in (sys.modules["sparsae.data.prepare"], sys.modules["sparsae.data.tokenizer"]):
        monkeypatch.setattr(module, "TRAINING_BYTES", 3000)
    monkeypatch.setattr("sparsae.data.tokenizer.train_bpe", trained)
    sources = [{"source": str(tmp_path / f"{letter}.txt"), "weight": n} for letter, n in (("a", 1), ("b", 1), ("c", 2))]
    with pytest.raises(InputError, match="seen"):
        prepare(DataConfig(sources=sources, cache=str(tmp_path / "cache")))
    letters = Counter("".join(seen).replace(" ", ""))
    assert [round(letters[letter] / 600) for letter in "abc"] == [1, 1, 2]


def test_the_held_out_text_has_its_field_and_each_source_its_own(tmp_path: Path) -> None:
    for name, field in (("a", "text"), ("b", "content"), ("held-out", "text")):
        rows = [json.dumps({field: f"{name} {i}: some words about {i * 7} things. " * 20}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    common = {"tokenizer_vocab": 300, "cache": str(tmp_path / "cache")}
    sources = [{"source": str(tmp_path / "a.jsonl")}, {"source": str(tmp_path / "b.jsonl"), "text_field": "content"}]
    config = DataConfig.model_validate(
        {"sources": sources, "validation_source": str(tmp_path / "held-out.jsonl"), **common}
    )
    corpus = prepare(config)
    text = corpus.tokenizer.decode(corpus.validation[:].tolist())
    assert text.count("held-out") == 30 * 20
    read = corpus.tokenizer.decode(np.concatenate([part[:] for part in corpus.train.parts]).tolist())  # type: ignore[union-attr]
    assert read.count("a 3: ") == read.count("b 3: ") == 20
