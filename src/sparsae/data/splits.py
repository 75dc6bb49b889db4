"""Which text is held out: a pure function of the documents themselves.

Documents go to validation whole, those with the lowest hashes of their texts, until they make up the share of all text.
A document that is longer than the whole share, as every one is where there are few, is cut instead, and its own last
share is held out: else the held-out text would be far too much, and of one kind. The order of the documents does not
matter, and copies of a text are never on both sides.

What is decided on is the first `_KNOWN` characters, all of the text or not. Beyond them nothing else is held in memory:
a document goes to validation if its hash falls into the lowest share of all hashes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Literal

Side = Literal["train", "validation"]

_HASHES = 2**64
_KNOWN = 64_000_000


@dataclass(frozen=True)
class Part:
    """A text of one side: a whole document, or one of the two parts of a document that was cut."""

    side: Side
    text: str
    whole: bool = True


def split_documents(
    texts: Iterable[str], share: float, looking: Callable[[int], None] = lambda size: None
) -> Iterator[Part]:
    """Send each text to a side, or cut it in two; both sides get something unless there is next to no text.

    `looking` is called with the characters that were read so far, before the first text is sent.
    """
    texts = iter(texts)
    known: deque[str] = deque()
    lengths: dict[int, int] = {}  # by hash, so that copies count once
    size = 0
    while size < _KNOWN and (text := next(texts, None)) is not None:
        known.append(text)
        size += len(text)
        looking(size)
        lengths[_hash(text)] = len(text)
    # A text of one character cannot be cut.
    longest = max(2.0, min(share, 1.0 - share) * sum(lengths.values()))
    last = _last_held_out(lengths, share, longest, everything=size < _KNOWN)
    for text in chain(_taken(known), texts):
        if len(text) >= longest:
            yield from _head_and_tail(text, share)
        else:
            yield Part("validation" if _hash(text) <= last else "train", text)


def _last_held_out(lengths: Mapping[int, int], share: float, longest: float, everything: bool) -> float:
    """The highest hash that is held out, given the length of each text by its hash; -1: none is."""
    short = sorted(value for value, length in lengths.items() if length < longest)
    # Where no text is cut, one has to stay for training.
    candidates = short if len(short) < len(lengths) else short[:-1]
    if not candidates:
        return -1
    if not everything:
        return min(max(share * _HASHES, candidates[0]), candidates[-1])
    wanted, held = share * sum(lengths[value] for value in short), 0
    last = candidates[0]
    for value in candidates:
        if held and held + lengths[value] / 2 > wanted:
            break
        held, last = held + lengths[value], value
    return last


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _taken(texts: deque[str]) -> Iterator[str]:
    """The texts, each forgotten as it goes."""
    while texts:
        yield texts.popleft()


def _head_and_tail(text: str, share: float) -> Iterator[Part]:
    """Cut before the last `share` of the characters, at the next line end, else word end, that halves it at most."""
    position = max(1, min(round(len(text) * (1 - share)), len(text) - 1))
    latest = position + (len(text) - position) // 2
    line_end, space = text.find("\n", position, latest), text.find(" ", position, latest)
    cut = next((end + 1 for end in (line_end, space) if end >= 0), position)
    yield Part("train", text[:cut], whole=False)
    yield Part("validation", text[cut:], whole=False)
