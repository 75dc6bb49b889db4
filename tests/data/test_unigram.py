"""The unigram perplexity against the formula written out."""

import math

import numpy as np
import pytest
import torch

from sparsae.data import unigram
from sparsae.data.shards import ShardedTokens


def test_it_is_the_formula(monkeypatch):
    monkeypatch.setattr(unigram, "_CHUNK", 3)
    counts = np.array([4, 0, 1])
    tokens = np.array([0, 0, 1, 2, 0, 1, 2])
    expected = math.exp(-sum(math.log((counts[t] + 1) / 8) for t in tokens) / len(tokens))
    for form in (tokens, torch.from_numpy(tokens), ShardedTokens([tokens[:2], tokens[2:]])):
        assert unigram.unigram_perplexity(counts, form) == pytest.approx(expected, rel=1e-12)
    assert unigram.unigram_perplexity(counts, torch.tensor([[0, 1], [2, 2]])) == pytest.approx(
        math.exp(-(math.log(5 / 8) + math.log(1 / 8) + 2 * math.log(2 / 8)) / 4)
    )


def test_uniform_counts_give_the_vocabulary():
    assert unigram.unigram_perplexity(np.full(50, 7), np.arange(50)) == pytest.approx(50)
