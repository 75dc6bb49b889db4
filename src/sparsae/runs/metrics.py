"""Rows into the metrics.jsonl of a run, and out of it. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparsae.errors import InputError
from sparsae.files import named, to_json
from sparsae.runs.rows import KINDS, Row, read_row

_END = 65536  # bytes


@dataclass(frozen=True, kw_only=True)
class Position:
    """The first `bytes` of a metrics.jsonl, and the SHA-256 of them."""

    bytes: int
    sha256: str


class MetricsWriter:
    """Adds rows to a metrics.jsonl, each handed over at once, so that others can follow the run."""

    def __init__(self, path: Path) -> None:
        """Goes on at the end of what is there; a link in the file's place is refused."""
        self._path = path
        with named(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o666)
        self._size, self._digest = 0, hashlib.sha256()
        if path.is_file():
            self._follow(path.stat().st_size)

    def cut(self, position: Position | None) -> None:
        """Cut back to where a checkpoint was saved (None: to nothing), so that a resumed run writes the rest again."""
        size = position.bytes if position else 0
        with named(self._path):
            os.ftruncate(self._file, size)
        self._follow(size)

    def write(self, row: Row) -> None:
        """Writes one row."""
        line = (to_json(row.to_dict()) + "\n").encode()
        with named(self._path):
            left = line
            while left:
                left = left[os.write(self._file, left) :]
        self._digest.update(line)
        self._size += len(line)

    def position(self) -> Position:
        """The end of the file, which is on disk by then."""
        with named(self._path):
            os.fsync(self._file)
        return Position(bytes=self._size, sha256=self._digest.hexdigest())

    def close(self) -> None:
        os.close(self._file)

    def _follow(self, size: int) -> None:
        self._size, self._digest = size, hashlib.sha256(self._path.read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_rows(path: Path, kinds: tuple[type[Row], ...]) -> Iterator[Row]:
    """The rows of these kinds in a metrics.jsonl, in order; a last line that was torn by a crash is left out.

    InputError, which names the line, where another one is not a row.
    """
    with named(path):
        lines = path.read_text("utf-8", errors="replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    passed_over = [name for name, kind in KINDS.items() if not issubclass(kind, kinds)]
    latest = 0
    for number, line in enumerate(lines, start=1):
        content = _object(line)
        if content is None and number == len(lines):
            return
        if content is None:
            raise InputError(f"{path}: line {number} is not a row of metrics; the file is damaged")
        row = None if content.get("kind") in passed_over else read_row(content, f"{path}: line {number}")
        if _step(content) < latest:
            raise InputError(f"{path}: line {number} goes back in steps; the file is damaged")
        latest = _step(content)
        if row is not None:
            yield row


def steps_done(path: Path) -> int:
    """Steps done by a run, as far as its metrics.jsonl says, of which only the end is read."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _END))
            lines = stream.read().split(b"\n")
    except OSError:
        return 0
    contents = (_object(line) for line in reversed(lines[:-1]))
    return next((_step(content) for content in contents if content is not None), 0)


def _object(line: str | bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _step(content: Mapping[str, Any]) -> int:
    step = content.get("step")
    return step if isinstance(step, int) else 0
