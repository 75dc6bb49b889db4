"""The split is a function of the set of documents, leaves no side empty and leaks nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.data.splits import split_documents

texts_lists = st.lists(st.text(min_size=1, max_size=3), max_size=30)
shares = st.floats(0.01, 0.99)


def sides(texts, share):
    found = {"train": [], "validation": []}
    for side, text in split_documents(texts, share):
        found[side].append(text)
    return found


@settings(deadline=None, max_examples=100)
@given(texts_lists, shares, st.randoms(use_true_random=False))
def test_every_document_has_one_side_whatever_the_order(texts, share, random):
    found = sides(texts, share)
    shuffled = random.sample(texts, len(texts))
    again = sides(shuffled, share)
    assert {side: sorted(found[side]) for side in found} == {side: sorted(again[side]) for side in again}
    assert not set(found["train"]) & set(found["validation"]) or len(set(texts)) == 1
    if len(set(texts)) > 1:
        assert sorted(found["train"] + found["validation"]) == sorted(texts)
        assert found["train"]
        assert found["validation"]


def test_the_share_is_about_what_was_asked():
    found = sides([f"document {i}" for i in range(5000)], 0.1)
    assert 400 < len(found["validation"]) < 600


def test_more_documents_move_no_other_one_between_hash_sides():
    few, many = (sides([f"document {i}" for i in range(n)], 0.3) for n in (500, 1000))
    assert set(few["validation"]) < set(many["validation"])


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    found = sides([text, text], 0.1)
    (head,), (tail,) = found["train"], found["validation"]
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.05 < len(tail) / len(text) < 0.1
    assert sides(["ab"], 0.01) == {"train": ["a"], "validation": ["b"]}
    assert sides(["a"], 0.5) == {"train": ["a"], "validation": []}
