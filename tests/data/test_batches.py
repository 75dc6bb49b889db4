"""Batches are a pure function of the step; an epoch shows everything once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.data.batches import Batches, evenly_spaced, left_over
from sparsae.errors import InputError


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 7), st.integers(5, 90), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_visits_every_window_once_over_all_ranks(context, extra, batch_size, ranks, seed):
    tokens = np.arange(context + extra)
    windows = (len(tokens) - 1) // context
    readers = [Batches(tokens, context, batch_size, seed, rank, ranks) for rank in range(ranks)]
    steps = 2 * windows // (batch_size * ranks) + 1
    read = torch.cat([reader.at(step) for step in range(steps) for reader in readers])
    assert read.dtype == torch.int64
    assert torch.equal(read - read[:, :1], torch.arange(context + 1).expand_as(read))
    expected = list(range(0, windows * context, context))
    for epoch in range(2):
        assert sorted(read[epoch * windows : (epoch + 1) * windows, 0].tolist()) == expected


def test_a_batch_depends_on_the_step_alone():
    tokens = np.arange(1000)
    one = Batches(tokens, 10, 4, seed=3)
    inorder = [one.at(step) for step in range(100)]
    other = Batches(tokens, 10, 4, seed=3)
    for step in (99, 0, 57, 3, 98, 24, 25):
        assert torch.equal(other.at(step), inorder[step])
    assert not torch.equal(Batches(tokens, 10, 4, seed=4).at(0), inorder[0])
    assert not torch.equal(torch.cat(inorder[:24]), torch.cat(inorder[25:49]))
    assert one.at(10**15).shape == (4, 11)


def test_ranks_divide_what_one_rank_reads():
    tokens = np.arange(500)
    whole = Batches(tokens, 7, 6, seed=0)
    halves = [Batches(tokens, 7, 3, 0, rank, 2) for rank in range(2)]
    for step in (0, 5, 40):
        assert torch.equal(whole.at(step), torch.cat([half.at(step) for half in halves]))


def test_a_batch_larger_than_the_corpus_repeats_it():
    batch = Batches(np.arange(9), 4, 5, seed=0).at(0)
    assert sorted(batch[:4, 0].tolist()) == [0, 0, 4, 4]


def test_a_batch_that_is_far_larger_than_the_corpus_is_refused():
    with pytest.raises(InputError, match=r"batch_size 5000: the text has 2 sequences .* give at most 4,096"):
        Batches(np.arange(9), 4, 5000, seed=0)
    assert Batches(np.arange(4 * 1000 + 1), 4, 5000, seed=0).at(0).shape == (5000, 5)


def test_evenly_spaced_windows_cover_the_text():
    tokens = np.arange(101)
    assert evenly_spaced(tokens, 10, 3)[:, 0].tolist() == [0, 40, 90]
    assert evenly_spaced(tokens, 10, 1).tolist() == [list(range(11))]
    everything = evenly_spaced(tokens, 10, 64)
    assert everything.shape == (10, 11)
    assert everything[:, 0].tolist() == list(range(0, 100, 10))


@given(windows=st.integers(1, 60), read=st.integers(1, 70), count=st.integers(1, 70))
def test_what_validation_leaves_shares_no_window_with_it(windows: int, read: int, count: int):
    tokens = np.arange(10 * windows + 1)
    taken, left = evenly_spaced(tokens, 10, read)[:, 0], left_over(tokens, 10, read, count)[:, 0]
    assert not set(taken.tolist()) & set(left.tolist())
    assert len(left) == len(set(left.tolist())) == min(count, max(0, windows - read))


def test_what_is_left_is_spread_over_the_text():
    assert left_over(np.arange(101), 10, 2, 3)[:, 0].tolist() == [10, 50, 80]
    assert left_over(np.arange(101), 10, 10, 3).shape == (0, 11)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="10 tokens are fewer than one window"):
        Batches(np.arange(10), 10, 1, seed=0)
    with pytest.raises(InputError, match=r"model.context \+ 1 = 11"):
        evenly_spaced(np.arange(3), 10, 1)
    with pytest.raises(ValueError, match="rank 2"):
        Batches(np.arange(100), 10, 1, 0, rank=2, ranks=2)
    with pytest.raises(ValueError, match="negative"):
        Batches(np.arange(100), 10, 1, 0).at(-1)
