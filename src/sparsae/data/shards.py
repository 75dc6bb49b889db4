"""Tokens on disk: flat binary files of one integer type, written once and read through memory maps."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Protocol, overload

import numpy as np
import numpy.typing as npt

SHARD_TOKENS = 2**28
"""Tokens in one shard file: 512 MiB of uint16."""

_BLOCK = 2**20
_BLOCKS = 64


class TokenSequence(Protocol):
    """What the readers of tokens ask for: a length and slices; arrays have it, and so has `ShardedTokens`."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: slice, /) -> Any: ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds ids below `vocab_size`, little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def digest(path: Path) -> str:
    """SHA-256 of a file of up to 64 MiB, and of 64 blocks of 1 MiB spread evenly over a larger one.

    Bounded, because every start of a run checks it: it finds files that were cut, mixed up or zeroed in large part,
    not every flipped bit of a large one.
    """
    size = path.stat().st_size
    found = sha256(str(size).encode())
    starts = list(range(0, size, _BLOCK))
    if len(starts) > _BLOCKS:
        starts = [(size - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            found.update(file.read(_BLOCK))
    return found.hexdigest()


class ShardedTokens:
    """The tokens of several shards as one sequence, of which slices are read into memory as int64.

    Indices and slices are those of a list, with a step of 1.
    """

    def __init__(self, shards: Sequence[npt.NDArray[Any]]) -> None:
        self._shards = [shard for shard in shards if len(shard)]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, item: slice, /) -> npt.NDArray[np.int64]: ...
    @overload
    def __getitem__(self, item: int, /) -> int: ...
    def __getitem__(self, item: slice | int, /) -> npt.NDArray[np.int64] | int:
        if not isinstance(item, slice):
            position = range(len(self))[item]
            return int(self[position : position + 1][0])
        start, stop, step = item.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of tokens has step 1, not {step}")
        return np.concatenate([np.empty(0, np.int64), *self._parts(start, stop)], dtype=np.int64)

    def _parts(self, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
        number = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            offset = self._starts[number]
            yield self._shards[number][start - offset : stop - offset]
            number += 1
            start = self._starts[number]


def map_shards(directory: Path, names: Sequence[str], dtype: np.dtype[Any]) -> ShardedTokens:
    """The shards `names` of `directory`, mapped into memory and not read."""
    return ShardedTokens([np.memmap(directory / name, dtype=dtype, mode="r") for name in names])


@dataclass
class ShardWriter:
    """Appends documents to the shards `split-00000.bin`, ... of a directory and counts what it writes."""

    directory: Path
    split: str
    dtype: np.dtype[Any]
    vocab_size: int
    shard_tokens: int = SHARD_TOKENS
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    names: list[str] = field(default_factory=list)
    counts: npt.NDArray[np.int64] = field(init=False)
    _file: IO[bytes] | None = None
    _room: int = 0

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.vocab_size, np.int64)

    def write(self, ids: npt.NDArray[np.int64], documents: int, text_bytes: int) -> None:
        """Append the ids of so many documents that had so many bytes of UTF-8."""
        self.counts += np.bincount(ids, minlength=self.vocab_size)
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += len(ids)
        while len(ids):
            if not self._room:
                self._next_file()
            assert self._file is not None
            part, ids = ids[: self._room], ids[self._room :]
            self._file.write(part.astype(self.dtype).tobytes())
            self._room -= len(part)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> dict[str, Any]:
        """The manifest's entry of this split."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "shards": self.names,
        }

    def _next_file(self) -> None:
        self.close()
        self.names.append(f"{self.split}-{len(self.names):05d}.bin")
        self._file = (self.directory / self.names[-1]).open("wb")
        self._room = self.shard_tokens
