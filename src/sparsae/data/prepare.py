"""The text that settings name, of one source or of several.

Each of several is prepared by itself, with the tokenizer that they share: with other weights, or with one source more,
no text is tokenized again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sparsae.config.data import DataConfig
from sparsae.data.corpus import (
    Corpus,
    Progress,
    content_of,
    is_prepared,
    prepare_source,
    silent,
    trained_as,
    training_texts,
)
from sparsae.data.entry import entry_of, is_whole, make_entry, seal
from sparsae.data.mixture import Mixture
from sparsae.data.tokenizer import TRAINING_BYTES, first_bytes, train_tokenizer
from sparsae.errors import InputError
from sparsae.files import expanded


def prepare(config: DataConfig, progress: Progress | None = None, own: Path | None = None) -> Corpus:
    """The corpus that `config` describes, from the cache or made now.

    own: a run's tokenizer, for one that `config` names and that is there no more. `max_documents` holds for each
    source. A source that is prepared text is taken as it is. Raises InputError for a source or a tokenizer that cannot
    be read, for too little text, for a cache that cannot be written, and for prepared text beside settings that would
    prepare it otherwise.
    """
    if own is not None and config.tokenizer != "train" and not os.path.exists(expanded(config.tokenizer)):
        config = config.model_copy(update={"tokenizer": str(own)})
    if not config.sources:
        return prepare_source(config, progress)
    alone = [config.model_copy(update={"source": each.source, "sources": [each]}) for each in config.sources]
    tokenizer = config.tokenizer
    if tokenizer == "train":
        tokenizer = str(_shared_tokenizer(config, alone, progress or silent))
    corpora = [prepare_source(each.model_copy(update={"tokenizer": tokenizer}), progress) for each in alone]
    return _mixed(config, corpora)


def _shared_tokenizer(config: DataConfig, alone: Sequence[DataConfig], report: Progress) -> Path:
    """Where the tokenizer lies that is trained on the first training texts of all sources, each by its weight."""
    for each in alone:
        if is_prepared(each.source):
            raise InputError(
                f"{each.source}: is prepared text with a tokenizer of its own, which then is that of all sources: set "
                f"data.tokenizer to {each.source}/tokenizer"
            )
    weights = [each.weight for each in config.sources]
    made_from = {
        "tokenizer": trained_as(config),
        "sources": [content_of(each) for each in alone],
        "weights": weights,
        "cut": "each to its share",
    }

    def write(unfinished: Path) -> None:
        budgets = [math.ceil(TRAINING_BYTES * weight / sum(weights)) for weight in weights]
        # A source is read by whole documents, which may be longer than its share.
        texts = [
            first_bytes(training_texts(each, budget, report), budget)
            for each, budget in zip(alone, budgets, strict=True)
        ]
        tokenizer = train_tokenizer(
            chain.from_iterable(texts), config.tokenizer_vocab, lambda: report("tokenizer", TRAINING_BYTES, None)
        )
        tokenizer.save(unfinished / "tokenizer")
        seal(unfinished, {"made_from": made_from, "tokenizer_hash": tokenizer.hash})

    directory = entry_of(config.cache, made_from)
    if not is_whole(directory):
        make_entry(directory, write, is_whole)
    return directory / "tokenizer"


def _mixed(config: DataConfig, corpora: Sequence[Corpus]) -> Corpus:
    weights = [each.weight for each in config.sources]
    train = Mixture.weighted((part for corpus in corpora for part in Mixture.of(corpus.train).parts), weights)
    first, own = corpora[0], config.validation_source is None
    validation = Mixture.weighted((c.validation for c in corpora), weights).read() if own else first.validation
    held_out = corpora if own else corpora[:1]
    manifest: dict[str, Any] = {
        "sources": [
            {"content": corpus.digest, "share": str(share)} for corpus, share in zip(corpora, train.shares, strict=True)
        ],
        "splits": {
            split: {
                key: sum(corpus.manifest["splits"][split][key] for corpus in those)
                for key in ("documents", "tokens", "bytes")
            }
            for split, those in (("train", corpora), ("validation", held_out))
        },
        "cut_documents": sum(corpus.manifest["cut_documents"] for corpus in held_out),
    }
    frequencies = sum(
        float(share) * corpus.train_counts / corpus.train_counts.sum()
        for corpus, share in zip(corpora, train.shares, strict=True)
    )
    counts = np.rint(len(train) * np.asarray(frequencies)).astype(np.int64)
    return Corpus(first.directory, manifest, first.tokenizer, train, validation, counts)
