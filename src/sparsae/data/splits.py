"""Which documents are held out: a pure function of the documents themselves.

A document goes to validation if the hash of its text falls into the lowest share of all hashes. The order of the
documents does not matter, and copies of a text are never on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal

Split = Literal["train", "validation"]

_HASHES = 2**64


def split_documents(texts: Iterable[str], share: float) -> Iterator[tuple[Split, str]]:
    """Send each text to a split, one at a time; both splits get something unless there is next to no text.

    The texts with the lowest and the highest hash are held back and come last: they go to validation and to train
    whatever their hash, so that two documents suffice. Of a corpus that is one text (or copies of it), the last
    `share` of the text is held out.
    """
    held: dict[int, list[str]] = {}
    for text in texts:
        value = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
        if value in held or len(held) < 2:
            held.setdefault(value, []).append(text)
            continue
        low, high = sorted(held)
        if low < value < high:
            yield _side(value, share), text
            continue
        passed = low if value < low else high
        for released in held.pop(passed):
            yield _side(passed, share), released
        held[value] = [text]
    if len(held) == 2:
        low, high = sorted(held)
        yield from (("validation", text) for text in held[low])
        yield from (("train", text) for text in held[high])
    elif held:
        yield from _head_and_tail(next(iter(held.values()))[0], share)


def _side(value: int, share: float) -> Split:
    return "validation" if value < share * _HASHES else "train"


def _head_and_tail(text: str, share: float) -> Iterator[tuple[Split, str]]:
    """Cut before the last `share` of the characters, after the next line end if one comes."""
    position = max(1, min(round(len(text) * (1 - share)), len(text) - 1))
    line_end = text.find("\n", position, len(text) - 1)
    cut = position if line_end < 0 else line_end + 1
    sides: list[tuple[Split, str]] = [("train", text[:cut]), ("validation", text[cut:])]
    yield from ((side, part) for side, part in sides if part)
