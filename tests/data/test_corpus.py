"""Prepared once, found again, never half-written."""

import errno
import fcntl
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsae.config.data import DataConfig
from sparsae.data import corpus as corpora
from sparsae.data import prepare
from sparsae.data.corpus import _percent, open_corpus, refuse_unread, tokenize_text
from sparsae.data.entry import cache_root
from sparsae.data.tokenizer import train_tokenizer
from sparsae.errors import InputError

GPT2 = Path("/work/shared/data/gpt2_bpe")
BOOKS = Path("/work/shared/data/books/train-0.jsonl.xz")


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"Document {i}: " + "the quick brown fox. " * (i + 1))
    return DataConfig(
        source=str(folder), cache=str(tmp_path / "cache"), tokenizer_vocab=300, validation_share=0.2, max_documents=30
    )


def entries(config):
    return sorted(path.name for path in Path(config.cache).iterdir())


def documents_of(tokens, tokenizer):
    ids = tokens[:]
    ends = [-1, *np.flatnonzero(ids == tokenizer.eos_id).tolist()]
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(ends)]


def test_every_document_is_there_once_and_counted(config):
    corpus = prepare(config)
    train, validation = (documents_of(tokens, corpus.tokenizer) for tokens in (corpus.train, corpus.validation))
    assert train
    assert validation
    written = [path.read_text() for path in sorted(Path(config.source).iterdir())[:30]]
    assert sorted(train + validation) == sorted(written)
    splits = corpus.manifest["splits"]
    assert splits["train"]["documents"] == len(train)
    assert splits["train"]["tokens"] == len(corpus.train) == corpus.train_counts.sum()
    assert corpus.validation_tokens == len(corpus.validation) == splits["validation"]["tokens"]
    assert splits["validation"]["bytes"] == sum(map(len, validation))
    assert corpus.train_counts.tolist() == np.bincount(corpus.train[:], minlength=corpus.vocab_size).tolist()
    assert corpus.manifest["tokenizer_hash"] == corpus.tokenizer.hash


def test_the_tokenizer_is_trained_on_training_documents_only(config):
    corpus = prepare(config)
    held_out = set(documents_of(corpus.validation, corpus.tokenizer))
    written = [path.read_text() for path in sorted(Path(config.source).iterdir())[:30]]
    seen = documents_of(corpus.train, corpus.tokenizer)
    assert held_out.isdisjoint(seen)
    assert train_tokenizer(seen, 300).hash == corpus.tokenizer.hash != train_tokenizer(written, 300).hash


def test_the_second_time_it_is_found(config, monkeypatch):
    stages = []
    first = prepare(config, lambda stage, done, total: stages.append((stage, done, total)))
    assert ("tokenize", 30, 30) in stages
    assert list(dict.fromkeys(stage for stage, *_ in stages)) == ["read", "tokenizer", "tokenize"]
    monkeypatch.setattr(corpora, "make_entry", None)
    second = prepare(config)
    assert second.manifest == first.manifest
    assert np.array_equal(second.train[:], first.train[:])
    assert entries(config) == [first.directory.name]


def test_another_text_or_setting_is_another_entry(config):
    first = prepare(config)
    changes = [{"tokenizer_vocab": 301}, {"validation_share": 0.3}, {"max_documents": 29}]
    others = {prepare(config.model_copy(update=change)).directory for change in changes}
    (Path(config.source) / "00.txt").write_text("changed now")
    assert len(others | {first.directory, prepare(config).directory}) == 5


@pytest.mark.parametrize("name", ["train-00000.bin", "manifest.json", "counts.safetensors", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_a_damaged_entry_is_made_anew(config, name, damage):
    first = prepare(config)
    tokens, path = first.train[:], first.directory / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        # Replaced rather than written over: the first corpus still maps the old file.
        path.unlink()
        path.write_bytes(content[:-7] if damage == "cut" else b"\xff" + content[1:])
    assert open_corpus(first.directory) is None
    again = prepare(config)
    assert again.directory == first.directory
    assert np.array_equal(again.train[:], tokens)
    assert entries(config) == [first.directory.name]


def test_an_interrupted_preparation_leaves_nothing(config):
    def interrupt(stage, done, total):
        if stage == "tokenize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, interrupt)
    assert entries(config) == []
    prepare(config)


def test_what_was_left_by_a_kill_is_removed_after_a_day(config):
    key = "0123456789abcdef" * 2
    names = (f"{key[:24]}-17-{key[:8]}", f"{key[:24]}-{key[:8]}", f"{key[:24]}-17-{key[:8]}-damaged")
    dead, young, held = (Path(config.cache, f"unfinished-{name}") for name in names)
    foreign = Path(config.cache, "unfinished-thesis")
    for path in (dead, young, held, foreign):
        path.mkdir(parents=True)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    an_hour_ago = time.time() - 3600
    for path in (dead, held, foreign):
        os.utime(path, (an_hour_ago, an_hour_ago))
    prepare(config)
    os.close(lock)
    assert not dead.exists()
    assert young.exists()
    assert held.exists()
    assert foreign.exists()


def test_preparations_at_once_agree(config):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare(config), range(4)))
    assert len({corpus.directory for corpus in made}) == 1
    assert all(np.array_equal(corpus.train[:], made[0].train[:]) for corpus in made)
    assert entries(config) == [made[0].directory.name]


def test_a_validation_source_is_held_out_whole(config, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Held out, größer.")
    corpus = prepare(config.model_copy(update={"validation_source": str(other)}))
    assert documents_of(corpus.validation, corpus.tokenizer) == ["Held out, größer."]
    assert corpus.manifest["splits"]["validation"]["bytes"] == len("Held out, größer.".encode())
    assert corpus.manifest["splits"]["train"]["documents"] == 30


def test_of_two_files_the_share_is_held_out_and_said(config, tmp_path):
    for name, words in (("short", 3000), ("long", 9000)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{i % 97}" for i in range(words)))
    corpus = prepare(config.model_copy(update={"source": str(tmp_path / "*.txt"), "validation_share": 0.05}))
    held = corpus.validation_tokens / (corpus.validation_tokens + len(corpus.train))
    assert 0.03 < held < 0.06
    ends = documents_of(corpus.validation, corpus.tokenizer)
    assert ["long" in end for end in ends] == [True, False]
    expected = f"held out: {corpus.validation_tokens:,} tokens, {100 * held:.2g} % of all: the ends of 2 long documents"
    assert corpus.held_out == expected


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.05, "5 %"), (0.0131, "1.3 %"), (0.3, "30 %"), (1e-7, "0.00001 %"), (0.999999, "99.9999 %"), (1.0, "100 %")],
)
def test_a_share_of_nearly_nothing_or_nearly_all_is_readable(share, text):
    assert _percent(share) == text


def test_whole_documents_that_are_held_out_are_counted(config):
    corpus = prepare(config)
    count = corpus.manifest["splits"]["validation"]["documents"]
    assert corpus.held_out.endswith(f"% of all: {count} whole documents")


def test_many_shards_and_batches_give_the_same_tokens(config, monkeypatch):
    expected = prepare(config)
    shutil.rmtree(config.cache)
    monkeypatch.setattr(corpora, "_GROUP", 500)
    monkeypatch.setattr(corpora.ShardWriter, "_next_file", small_shards(corpora.ShardWriter._next_file))
    corpus = prepare(config)
    assert len(corpus.manifest["splits"]["train"]["shards"]) > 3
    assert np.array_equal(corpus.train[:], expected.train[:])


def small_shards(next_file):
    def smaller(self):
        next_file(self)
        self._room = 100

    return smaller


@pytest.mark.parametrize(
    ("text", "expected"), [("", "no text to train on"), (" \n", "no text"), ("a", "too little text")]
)
def test_too_little_text_is_refused(tmp_path, text, expected):
    source = tmp_path / "a.txt"
    source.write_text(text)
    config = DataConfig(source=str(source), cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=expected):
        prepare(config)
    assert entries(config) == []
    (tmp_path / "b.txt").write_text("enough of it")
    config = DataConfig(source=str(tmp_path / "b.txt"), validation_source=str(source), cache=config.cache)
    if not text.strip():
        with pytest.raises(InputError, match=r"a.txt: no text in it"):
            prepare(config)


def test_a_cache_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"cache": str(tmp_path / "file" / "cache")})
    with pytest.raises(InputError, match=r"file.*cannot be written.*set data.cache or SPARSAE_CACHE"):
        prepare(blocked)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("SPARSAE_CACHE", "/elsewhere")
    assert cache_root("/here") == Path("/here")
    assert cache_root(None) == Path("/elsewhere")
    monkeypatch.delenv("SPARSAE_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "sparsae"


def test_a_text_to_evaluate_is_tokenized_whole(config, tmp_path):
    tokenizer = prepare(config).tokenizer
    tokens, size, count = tokenize_text(config.source, tokenizer, max_documents=3, vocab_size=300)
    texts = [path.read_text() for path in sorted(Path(config.source).iterdir())[:3]]
    assert tokens.tolist() == [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eos_id)]
    assert (tokens.dtype, size, count) == (np.int64, sum(map(len, texts)), 3)
    with pytest.raises(InputError, match="the tokenizer has 300 entries, the model has 299"):
        tokenize_text(config.source, tokenizer, vocab_size=299)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="no text in it"):
        tokenize_text(str(tmp_path / "empty.txt"), tokenizer)


def test_an_entry_of_another_kind_is_not_opened(tmp_path):
    assert open_corpus(tmp_path) is None
    (tmp_path / "manifest.json").write_text("[]")
    save_file({"train": np.zeros(3, np.int64)}, tmp_path / "counts.safetensors")
    assert open_corpus(tmp_path) is None


@pytest.mark.skipif(not (GPT2.exists() and BOOKS.exists()), reason="the shared books and vocabulary are not here")
def test_books_with_the_tokenizer_of_gpt2(tmp_path):
    config = DataConfig(source=str(BOOKS), tokenizer=str(GPT2), max_documents=2, cache=str(tmp_path))
    corpus = prepare(config)
    assert corpus.vocab_size == 50257
    assert corpus.manifest["dtype"] == "<u2"
    assert [corpus.manifest["splits"][name]["documents"] for name in ("train", "validation")] == [2, 2]
    assert 0.01 < corpus.validation_tokens / (corpus.validation_tokens + len(corpus.train)) < 0.025
    assert corpus.held_out.endswith("% of all: the ends of 2 long documents")
    assert 3 < corpus.manifest["splits"]["validation"]["bytes"] / corpus.validation_tokens < 5


def test_prepared_text_is_a_source_wherever_it_is_carried(config, tmp_path):
    corpus = prepare(config)
    carried = tmp_path / "elsewhere"
    shutil.copytree(corpus.directory, carried)
    shutil.rmtree(config.source)
    found = prepare(DataConfig(source=str(carried), cache=str(tmp_path / "other")))
    assert found.digest == corpus.digest
    assert not (tmp_path / "other").exists()
    same = prepare(DataConfig(source=str(carried), tokenizer=str(carried / "tokenizer")))
    assert same.digest == corpus.digest
    train_tokenizer(["other words"], 300).save(tmp_path / "other")
    wrong = {"tokenizer": str(tmp_path / "other"), "validation_source": "y.txt", "max_documents": 3}
    for key, value in {"validation_share": 0.4, "text_field": "body"}.items():
        unread = DataConfig(source=str(carried), **{key: value})
        assert prepare(unread).digest == corpus.digest  # of a run that has it already
        with pytest.raises(InputError, match=f"is prepared text, of which data.{key} changes nothing: leave it out"):
            refuse_unread(unread)
    for key, value in wrong.items():
        with pytest.raises(InputError, match="is prepared text"):
            prepare(DataConfig(source=str(carried), **{key: value}))
    (carried / "train-00000.bin").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        prepare(DataConfig(source=str(carried)))


def test_a_collection_with_a_manifest_of_its_own_is_text(config):
    Path(config.source, "manifest.json").write_text('{"name": "a collection"}')
    assert len(prepare(config).train) > 100


def test_a_tokenizer_that_is_gone_is_a_runs_own(config, tmp_path):
    corpus = prepare(config)
    for name in ("named", "own"):
        corpus.tokenizer.save(tmp_path / name)
    named = config.model_copy(update={"tokenizer": str(tmp_path / "named")})
    before = prepare(named, own=tmp_path / "nothing")
    shutil.rmtree(tmp_path / "named")
    with pytest.raises(InputError, match="no such tokenizer"):
        prepare(named)
    after = prepare(named, own=tmp_path / "own")
    assert (after.digest, after.directory) == (before.digest, before.directory)


def test_a_full_directory_of_temporary_files_is_named(config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparsae.data.bpe.TemporaryFile", full)
    with pytest.raises(InputError, match="cannot be written there: No space left on device; set TMPDIR"):
        prepare(config)
    assert entries(config) == []
