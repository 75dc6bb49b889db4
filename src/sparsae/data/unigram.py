"""The perplexity of a model that knows only how often each token occurs: the least that training must beat."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK = 2**22


def count_tokens(tokens: Any, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id below `vocab_size` occurs: int64 (vocab_size,).

    `tokens` is a `TokenSequence`, or an array or CPU tensor of any shape, and is read in chunks.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(np.asarray(tokens[start : start + _CHUNK]).ravel(), minlength=vocab_size)
    return counts


def unigram_perplexity(counts: npt.NDArray[np.int64], tokens: Any) -> float:
    """exp of the mean of -log p over `tokens`, p(t) = (counts[t] + 1) / (sum(counts) + V) with V = len(counts).

    `counts` are those of the training tokens (`Corpus.train_counts`); `tokens` as in `count_tokens`.
    """
    log_p = np.log(counts + 1.0) - math.log(float(counts.sum()) + len(counts))
    seen = count_tokens(tokens, len(counts))
    return math.exp(-float(seen @ log_p) / float(seen.sum()))
