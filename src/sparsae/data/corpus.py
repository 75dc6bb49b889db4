"""Prepared text: tokenized once into a directory of the cache, then only mapped into memory.

    cache/<key>/manifest.json        what it was made from, counts, and a digest of every other file
    cache/<key>/tokenizer/           the tokenizer, as transformers reads it
    cache/<key>/train-00000.bin      the tokens of the training documents, each document followed by the end token
    cache/<key>/validation-00000.bin
    cache/<key>/counts.safetensors   how often each token occurs in train

The key is a hash of everything that the content depends on. An entry is made under another name and renamed when it
is complete, so that an interrupted preparation leaves no entry, and of two that run at once the second takes the
first one's result. An entry whose files do not match their digests is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsae.config.schema import DataConfig
from sparsae.data.shards import ShardedTokens, ShardWriter, digest, map_shards, token_dtype
from sparsae.data.sources import documents, expected_documents, fingerprint
from sparsae.data.splits import Split, split_documents
from sparsae.data.tokenizer import TRAINING_BYTES, Tokenizer, load_or_train, load_tokenizer, pieces
from sparsae.errors import InputError

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total): `tokenizer` counts bytes of text, `tokenize` documents; total may be unknown."""

FORMAT = 1
_BATCH_BYTES = 4_000_000
_ABANDONED = 24 * 3600.0


@dataclass(frozen=True)
class Corpus:
    """The tokens of both splits, the tokenizer, and what is known about them."""

    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: ShardedTokens
    validation: ShardedTokens
    train_counts: npt.NDArray[np.int64]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def digest(self) -> str:
        """A hash of everything in it: tokens of both splits, counts and tokenizer."""
        return sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    @property
    def validation_tokens(self) -> int:
        return len(self.validation)

    @property
    def validation_bytes(self) -> int:
        """Bytes of UTF-8 of the validation documents."""
        return int(self.manifest["splits"]["validation"]["bytes"])


def prepare(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """The corpus that `config` describes, from the cache or made now.

    `max_documents` holds for each of the two sources. Raises InputError for a source or a tokenizer that cannot be
    read, for too little text, and for a cache that cannot be written.
    """
    report = progress or _silent
    given = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    made_from = _made_from(config, given)
    root = cache_root(config.cache)
    directory = root / sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]
    found = open_corpus(directory)
    if found is not None:
        return found
    try:
        return _make(directory, config, given, made_from, report)
    except OSError as error:
        raise InputError(
            f"{error.filename or root}: prepared data cannot be written: {error.strerror or error}; "
            "set data.cache or SPARSAE_CACHE to a directory that can"
        ) from None


def open_corpus(directory: Path) -> Corpus | None:
    """The finished entry in `directory`, or None where there is none or its files are not what was written."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        if any(digest(directory / name) != expected for name, expected in manifest["files"].items()):
            return None
        dtype = np.dtype(manifest["dtype"])
        train, validation = (
            map_shards(directory, manifest["splits"][name]["shards"], dtype) for name in ("train", "validation")
        )
        tokenizer = load_tokenizer(directory / "tokenizer")
        counts = _load_counts(directory / "counts.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Corpus(directory, manifest, tokenizer, train, validation, counts)


def cache_root(cache: str | None) -> Path:
    """`cache`, else $SPARSAE_CACHE, else ~/.cache/sparsae."""
    return Path(cache or os.environ.get("SPARSAE_CACHE") or "~/.cache/sparsae").expanduser()


def tokenize_text(
    source: str,
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[npt.NDArray[np.int64], int, int]:
    """(tokens with the end token after every document, bytes of UTF-8, documents) of `source`, held in memory.

    Raises InputError where the source cannot be read or holds no text, and where the tokenizer has ids that a model
    with `vocab_size` embeddings lacks.
    """
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model has {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    report = progress or _silent
    total = expected_documents(source, max_documents)
    tokens, text_bytes, count = [], 0, 0
    texts = (("validation", text) for text in documents(source, text_field, max_documents))
    for batch in _batches(texts):
        for _, ids, size in _encoded(batch, tokenizer):
            tokens.append(ids)
            text_bytes += size
            count += 1
        report("tokenize", count, total)
    if not tokens:
        raise InputError(f"{source}: no text in it")
    return np.concatenate(tokens), text_bytes, count


def _made_from(config: DataConfig, given: Tokenizer | None) -> dict[str, Any]:
    """Everything that the prepared form depends on; JSON."""
    import tokenizers

    trained = {"entries": config.tokenizer_vocab, "bytes": TRAINING_BYTES, "library": tokenizers.__version__}
    held_out = config.validation_source
    return {
        "format": FORMAT,
        "source": fingerprint(config.source),
        "validation": config.validation_share if held_out is None else fingerprint(held_out),
        "text_field": config.text_field,
        "max_documents": config.max_documents,
        "tokenizer": trained if given is None else given.hash,
    }


def _make(
    directory: Path, config: DataConfig, given: Tokenizer | None, made_from: dict[str, Any], report: Progress
) -> Corpus:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory.parent)
    unfinished = directory.with_name(f"unfinished-{directory.name}-{os.getpid()}-{token_hex(4)}")
    unfinished.mkdir()
    try:
        _write_entry(unfinished, config, given, made_from, report)
        _publish(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    corpus = open_corpus(directory)
    if corpus is None:
        raise InputError(f"{directory}: prepared data was changed while it was written; start again")
    return corpus


def _write_entry(
    directory: Path, config: DataConfig, given: Tokenizer | None, made_from: dict[str, Any], report: Progress
) -> None:
    texts = _split_texts(config)
    tokenizer = given
    if tokenizer is None:
        first, texts = _for_tokenizer(texts, config, report)
        tokenizer = load_or_train("train", first, config.tokenizer_vocab)
    vocab_size, dtype = tokenizer.vocab_size, token_dtype(tokenizer.vocab_size)
    writers: dict[str, ShardWriter] = {
        name: ShardWriter(directory, name, dtype, vocab_size) for name in ("train", "validation")
    }
    try:
        _write_tokens(texts, tokenizer, writers, config, report)
    finally:
        for writer in writers.values():
            writer.close()
    _check_counts(config, writers)
    tokenizer.save(directory / "tokenizer")
    _save_counts(writers["train"].counts, directory / "counts.safetensors")
    manifest = {
        "made_from": made_from,
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "splits": {name: writer.summary() for name, writer in writers.items()},
        "files": {
            path.relative_to(directory).as_posix(): digest(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _split_texts(config: DataConfig) -> Iterator[tuple[Split, str]]:
    texts = documents(config.source, config.text_field, config.max_documents)
    if config.validation_source is None:
        return split_documents(texts, config.validation_share)
    held_out = documents(config.validation_source, config.text_field, config.max_documents)
    training: Iterator[tuple[Split, str]] = (("train", text) for text in texts)
    return chain(training, (("validation", text) for text in held_out))


def _for_tokenizer(
    texts: Iterator[tuple[Split, str]], config: DataConfig, report: Progress
) -> tuple[list[str], Iterator[tuple[Split, str]]]:
    """The first training texts, `TRAINING_BYTES` of them, and all texts again from the start."""
    read: list[tuple[Split, str]] = []
    size = 0
    for split, text in texts:
        read.append((split, text))
        size += len(text.encode()) if split == "train" else 0
        if size >= TRAINING_BYTES:
            break
    if not size:
        raise InputError(f"{config.source}: no text to train on; give a source with text in it")
    report("tokenizer", size, None)
    return [text for split, text in read if split == "train"], chain(read, texts)


def _write_tokens(
    texts: Iterator[tuple[Split, str]],
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    config: DataConfig,
    report: Progress,
) -> None:
    total, done = _expected(config), 0
    report("tokenize", 0, total)
    for batch in _batches(texts):
        for split, ids, size in _encoded(batch, tokenizer):
            writers[split].write(ids, 1, size)
        done += len(batch)
        report("tokenize", done, total)


def _expected(config: DataConfig) -> int | None:
    counts = [
        expected_documents(source, config.max_documents)
        for source in (config.source, config.validation_source)
        if source is not None
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Texts in groups of some megabytes: enough for all cores, little enough to hold."""
    batch: list[tuple[str, str]] = []
    size = 0
    for split, text in texts:
        batch.append((split, text))
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batch: list[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[str, npt.NDArray[np.int64], int]]:
    """(split, ids with the end token, bytes of UTF-8) of each text of a batch."""
    cut = [list(pieces(text)) for _, text in batch]
    ids = iter(tokenizer.encode_batch([piece for text in cut for piece in text]))
    for (split, text), parts in zip(batch, cut, strict=True):
        encoded = chain(*(next(ids) for _ in parts), (tokenizer.eos_id,))
        yield split, np.fromiter(encoded, np.int64), len(text.encode())


def _check_counts(config: DataConfig, writers: dict[str, ShardWriter]) -> None:
    if not writers["train"].tokens:
        raise InputError(f"{config.source}: no text to train on; give a source with text in it")
    if not writers["validation"].tokens:
        source = config.validation_source
        reason = "too little text to hold any of it out" if source is None else "no text in it"
        raise InputError(f"{source or config.source}: {reason}; give more text, or data.validation_source")


def _publish(unfinished: Path, directory: Path) -> None:
    """Give a complete entry its name; what another process has put there in the meantime stays if it is sound."""
    try:
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        if open_corpus(directory) is None:
            # Renamed away first, so that no reader ever sees an entry half removed.
            damaged = unfinished.with_name(f"{unfinished.name}-damaged")
            directory.rename(damaged)
            unfinished.rename(directory)
            shutil.rmtree(damaged, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Remove what preparations that were killed have left behind a day ago or more."""
    for path in root.glob("unfinished-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def _save_counts(counts: npt.NDArray[np.int64], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"train": counts}, path)


def _load_counts(path: Path) -> npt.NDArray[np.int64]:
    from safetensors.numpy import load_file

    return load_file(path)["train"]


def _silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
