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
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from sparsae.config.data import DataConfig
from sparsae.data.entry import MANIFEST, entry_of, make_entry, read_whole, seal
from sparsae.data.mixture import Mixture
from sparsae.data.shards import ShardWriter, TokenSequence, map_shards, token_dtype
from sparsae.data.sources import documents, expected_documents, fingerprint
from sparsae.data.splits import Part, split_documents
from sparsae.data.tokenizer import TRAINING_BYTES, Tokenizer, load_tokenizer, pieces, train_tokenizer
from sparsae.errors import InputError
from sparsae.files import expanded, open_as_directory

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total): `read` and `tokenizer` count bytes, `tokenize` documents; total may be None.

It is called about once a second while anything goes on, so that a display can show that it does."""

FORMAT = 2
_GROUP = 1_000_000  # characters that are encoded at a time


@dataclass(frozen=True)
class Corpus:
    """The tokens of both splits, the tokenizer, and what is known about them."""

    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenSequence | Mixture
    validation: TokenSequence
    train_counts: npt.NDArray[np.int64]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def digest(self) -> str:
        """A hash of everything in it: tokens of both splits and how they are read, counts and tokenizer."""
        content = {key: value for key, value in self.manifest.items() if key != "made_from"}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def validation_tokens(self) -> int:
        return len(self.validation)

    @property
    def held_out(self) -> str:
        """What was held out, for people: how many tokens, of what, and which share of all that is."""
        train, validation = (self.manifest["splits"][name] for name in ("train", "validation"))
        cut = self.manifest["cut_documents"]
        whole = validation["documents"] - cut
        parts = [f"{whole:,} whole document{'s' if whole > 1 else ''}"] if whole else []
        parts += ["the end of a long document" if cut == 1 else f"the ends of {cut:,} long documents"] if cut else []
        share = validation["tokens"] / (validation["tokens"] + train["tokens"])
        read = f"; {self.validation_tokens:,} are read" if self.validation_tokens < validation["tokens"] else ""
        return f"held out: {validation['tokens']:,} tokens, {_percent(share)} of all: {' and '.join(parts)}{read}"


def _percent(share: float) -> str:
    """With as many places as it takes to tell the share from nothing, and from all."""
    rest = 100 * min(share, 1 - share)
    places = 0 if rest <= 0 else max(0, 1 - math.floor(math.log10(rest)))
    text = f"{100 * share:.{places}f}"
    return f"{text.rstrip('0').rstrip('.') if places else text} %"


def prepare_source(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """The corpus of `config.source`, from the cache or made now; errors as `prepare.prepare` has them."""
    report = progress or silent
    if is_prepared(config.source):
        return _as_prepared(config)
    given = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    made_from = _made_from(config, given)
    directory = entry_of(config.cache, made_from)
    if (found := open_corpus(directory)) is not None:
        return found
    make_entry(
        directory,
        lambda unfinished: _write_entry(unfinished, config, given, made_from, report),
        lambda path: open_corpus(path) is not None,
    )
    corpus = open_corpus(directory)
    if corpus is None:
        raise InputError(f"{directory}: prepared data was changed while it was written; start again")
    return corpus


def open_corpus(directory: Path) -> Corpus | None:
    """The finished entry in `directory`, or None where there is none or its files are not what was written."""
    try:
        manifest = read_whole(directory)
        dtype = np.dtype(manifest["dtype"])
        train, validation = (
            map_shards(directory, manifest["splits"][name]["shards"], dtype) for name in ("train", "validation")
        )
        tokenizer = load_tokenizer(directory / "tokenizer")
        counts = _load_counts(directory / "counts.safetensors")
    except (OSError, InputError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Corpus(directory, manifest, tokenizer, train, validation, counts)


def is_prepared(source: str) -> bool:
    """Whether a source is a directory of prepared text, such as `prepare` leaves in the cache, and not text."""
    manifest = Path(expanded(source)) / MANIFEST
    try:
        # Other collections of text have manifests, too.
        return manifest.is_file() and b'"made_from"' in manifest.read_bytes()
    except OSError:
        return False


def _as_prepared(config: DataConfig) -> Corpus:
    found = open_corpus(Path(expanded(config.source)))
    if found is None:
        raise InputError(f"{config.source}: prepared text that is damaged, or of another version: prepare it again")
    is_other = config.tokenizer != "train" and load_tokenizer(config.tokenizer).hash != found.tokenizer.hash
    if is_other or config.validation_source is not None or config.max_documents is not None:
        raise InputError(
            f"{config.source}: is prepared text, with its tokenizer and its held-out part: leave out data.tokenizer, "
            "data.validation_source and data.max_documents"
        )
    return found


def refuse_unread(config: DataConfig) -> None:
    """Raise InputError for settings of how text is read, where all of it is prepared text."""
    names = ("validation_share", "text_field")
    given = [f"data.{name}" for name in names if getattr(config, name) != DataConfig.model_fields[name].default]
    if given and not config.sources and is_prepared(config.source):
        raise InputError(f"{config.source}: is prepared text, of which {given[0]} changes nothing: leave it out")


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
    report = progress or silent
    total = expected_documents(source, max_documents)
    tokens: list[npt.NDArray[np.int64]] = []
    text_bytes = 0
    parts = (Part("validation", text) for text in documents(source, text_field, max_documents))
    for part, ids in _encoded(parts, tokenizer, lambda: report("tokenize", len(tokens), total)):
        tokens.append(ids)
        text_bytes += len(part.text.encode())
    if not tokens:
        raise InputError(f"{source}: no text in it")
    return np.concatenate(tokens), text_bytes, len(tokens)


def _made_from(config: DataConfig, given: Tokenizer | None) -> dict[str, Any]:
    """Everything that the prepared form depends on; JSON."""
    return {
        "format": FORMAT,
        **content_of(config),
        "tokenizer": trained_as(config) if given is None else given.hash,
    }


def content_of(config: DataConfig) -> dict[str, Any]:
    """The text that is meant, as far as it can be told without reading it; JSON."""
    held_out = config.validation_source
    return {
        "source": fingerprint(config.source),
        "validation": config.validation_share if held_out is None else fingerprint(held_out),
        "text_field": config.training_field,
        **({} if held_out is None or config.training_field == config.text_field else {"its_field": config.text_field}),
        "max_documents": config.max_documents,
    }


def trained_as(config: DataConfig) -> dict[str, Any]:
    """What a tokenizer that is trained here depends on beside the text; JSON."""
    import tokenizers

    return {"entries": config.tokenizer_vocab, "bytes": TRAINING_BYTES, "library": tokenizers.__version__}


def training_texts(config: DataConfig, size: int, report: Progress) -> list[str]:
    """The first texts to train on of `config.source`, so many bytes of them or, with the last text, more."""
    return _first_texts(_split_texts(config, report), config, size, report)[0]


def _write_entry(
    directory: Path, config: DataConfig, given: Tokenizer | None, made_from: dict[str, Any], report: Progress
) -> None:
    parts = _split_texts(config, report)
    tokenizer = given
    if tokenizer is None:
        first, parts = _first_texts(parts, config, TRAINING_BYTES, report)
        size = min(TRAINING_BYTES, sum(len(text.encode()) for text in first))
        report("tokenizer", size, None)
        tokenizer = train_tokenizer(first, config.tokenizer_vocab, lambda: report("tokenizer", size, None))
    vocab_size, dtype = tokenizer.vocab_size, token_dtype(tokenizer.vocab_size)
    writers: dict[str, ShardWriter] = {
        name: ShardWriter(directory, name, dtype, vocab_size) for name in ("train", "validation")
    }
    try:
        ends = _write_tokens(parts, tokenizer, writers, config, report)
    finally:
        for writer in writers.values():
            writer.close()
    _require_counts(config, writers)
    tokenizer.save(directory / "tokenizer")
    _save_counts(writers["train"].counts, directory / "counts.safetensors")
    manifest = {
        "made_from": made_from,
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "splits": {name: writer.summary() for name, writer in writers.items()},
        "cut_documents": ends,
    }
    seal(directory, manifest)


def _split_texts(config: DataConfig, report: Progress) -> Iterator[Part]:
    texts = documents(config.source, config.training_field, config.max_documents)
    if config.validation_source is None:
        return split_documents(texts, config.validation_share, lambda size: report("read", size, None))
    held_out = documents(config.validation_source, config.text_field, config.max_documents)
    return chain((Part("train", text) for text in texts), (Part("validation", text) for text in held_out))


def _first_texts(
    parts: Iterator[Part], config: DataConfig, size: int, report: Progress
) -> tuple[list[str], Iterator[Part]]:
    """The first training texts, `size` bytes of them, and all texts again from the start."""
    read: list[Part] = []
    found = 0
    for part in parts:
        read.append(part)
        found += len(part.text.encode()) if part.side == "train" else 0
        report("read", found, None)
        if found >= size:
            break
    if not found:
        raise InputError(f"{config.source}: no text to train on; give a source with text in it")
    return [part.text for part in read if part.side == "train"], chain(read, parts)


def _write_tokens(
    parts: Iterator[Part],
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    config: DataConfig,
    report: Progress,
) -> int:
    """Encode and write every part; returns how many held-out parts are the end of a document that was cut."""
    total, ends = _expected(config), 0

    def tell() -> None:
        # Of a document that was cut both sides have a part.
        report("tokenize", sum(writer.documents for writer in writers.values()) - ends, total)

    tell()
    for part, ids in _encoded(parts, tokenizer, tell):
        writers[part.side].write(ids, 1, len(part.text.encode()))
        ends += part.side == "validation" and not part.whole
    tell()
    return ends


def _expected(config: DataConfig) -> int | None:
    counts = [
        expected_documents(source, config.max_documents)
        for source in (config.source, config.validation_source)
        if source is not None
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _encoded(
    parts: Iterable[Part], tokenizer: Tokenizer, tick: Callable[[], None]
) -> Iterator[tuple[Part, npt.NDArray[np.int64]]]:
    """(part, its ids with the end token), in order; `tick` is called between groups of some megabytes.

    A group is enough for all cores, little enough to hold, and encoded before anybody waits for it: the library does
    not look at signals meanwhile.
    """
    group: list[tuple[Part, bool, str]] = []  # (part, whether this is the end of it, piece)
    known: list[npt.NDArray[np.int64]] = []
    size = 0

    def encode() -> Iterator[tuple[Part, npt.NDArray[np.int64]]]:
        for (part, last, _), ids in zip(group, tokenizer.encode_batch([piece for *_, piece in group]), strict=True):
            known.append(np.array(ids, np.int64))
            if last:
                yield part, np.concatenate((*known, [tokenizer.eos_id]))
                known.clear()
        group.clear()
        tick()

    for part in parts:
        cut = 0
        for piece in pieces(part.text):
            cut += len(piece)
            group.append((part, cut == len(part.text), piece))
            size += len(piece)
            if size >= _GROUP:
                yield from encode()
                size = 0
    yield from encode()


def _require_counts(config: DataConfig, writers: dict[str, ShardWriter]) -> None:
    if not writers["train"].tokens:
        raise InputError(f"{config.source}: no text to train on; give a source with text in it")
    if not writers["validation"].tokens:
        source = config.validation_source
        reason = "too little text to hold any of it out" if source is None else "no text in it"
        raise InputError(f"{source or config.source}: {reason}; give more text, or data.validation_source")


def _save_counts(counts: npt.NDArray[np.int64], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"train": counts}, path)
    open_as_directory(path)


def _load_counts(path: Path) -> npt.NDArray[np.int64]:
    from safetensors.numpy import load_file

    return load_file(path)["train"]


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
