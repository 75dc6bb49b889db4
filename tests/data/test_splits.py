"""The split is a function of the set of documents, leaves no side empty, leaks nothing, holds the share."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.data import splits
from sparsae.data.splits import split_documents

texts_lists = st.lists(st.text(min_size=1, max_size=30), max_size=30)
shares = st.floats(0.01, 0.99)


def sides(texts, share):
    found = {"train": [], "validation": []}
    for part in split_documents(texts, share):
        found[part.side].append(part.text)
    return found


def text(words, seed):
    random = Random(seed)
    return "".join(f"{random.choice('abcdefgh')}{random.randrange(1000)}{random.choice('  n')}" for _ in range(words))


@pytest.mark.parametrize("known", [64_000_000, 40])
@settings(deadline=None, max_examples=100)
@given(texts=texts_lists, share=shares, random=st.randoms(use_true_random=False))
def test_every_character_has_one_side_and_copies_have_the_same(known, texts, share, random):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_KNOWN", known)
        parts = list(split_documents(texts, share))
        held = {part.text for part in parts if part.whole and part.side == "validation"}
        assert held.isdisjoint(part.text for part in parts if part.whole and part.side == "train")
        cut = [part for part in parts if not part.whole]
        assert [part.side for part in cut] == ["train", "validation"] * (len(cut) // 2)
        joined = [head.text + tail.text for head, tail in zip(cut[::2], cut[1::2], strict=True)]
        assert sorted([part.text for part in parts if part.whole] + joined) == sorted(texts)
        assert all(part.text for part in cut)
        if len(set(texts)) > 1 or any(len(text) > 1 for text in texts):
            assert {part.side for part in parts} == {"train", "validation"}
        if known > 1000:
            again = split_documents(random.sample(texts, len(texts)), share)
            assert sorted((p.side, p.text) for p in again) == sorted((p.side, p.text) for p in parts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(10, 4000), min_size=1, max_size=120), st.floats(0.02, 0.5))
def test_the_share_is_about_what_was_asked_whatever_the_number_and_the_sizes(sizes, share):
    texts = [text(words, seed) for seed, words in enumerate(sizes)]
    found = sides(texts, share)
    held = sum(map(len, found["validation"])) / sum(map(len, texts))
    assert 0.4 * share - 0.001 < held < 1.7 * share


def test_two_documents_are_both_held_out_at_their_ends():
    texts = [text(2000, 0), text(20_000, 1)]
    found = sides(texts, 0.02)
    assert [head + tail for head, tail in zip(found["train"], found["validation"], strict=True)] == texts
    for whole, tail in zip(texts, found["validation"], strict=True):
        assert 0.009 < len(tail) / len(whole) < 0.0201
        assert whole[-len(tail) - 1] in " \n"


def test_many_documents_stay_whole_and_the_share_holds_beyond_what_is_known(monkeypatch):
    monkeypatch.setattr(splits, "_KNOWN", 20_000)
    parts = list(split_documents([f"document {i}" for i in range(5000)], 0.1))
    assert all(part.whole for part in parts)
    assert 400 < sum(part.side == "validation" for part in parts) < 600


def test_more_documents_move_no_other_one(monkeypatch):
    monkeypatch.setattr(splits, "_KNOWN", 1000)
    few, many = (sides([f"document {i}" for i in range(n)], 0.3) for n in (500, 1000))
    assert set(few["validation"]) < set(many["validation"])


def test_a_single_document_is_cut_at_a_line():
    lines = "".join(f"line {i}\n" for i in range(100))
    found = sides([lines], 0.1)
    (head,), (tail,) = found["train"], found["validation"]
    assert head + tail == lines
    assert head.endswith("\n")
    assert 0.05 < len(tail) / len(lines) < 0.1
    assert sides(["ab"], 0.01) == {"train": ["a"], "validation": ["b"]}
    assert sides(["a"], 0.5) == {"train": ["a"], "validation": []}
    # One long line: at a word, and never so late that little is held out.
    (tail,) = sides(["word " * 200 + "\n"], 0.1)["validation"]
    assert 0.05 < len(tail) / 1001 <= 0.1
