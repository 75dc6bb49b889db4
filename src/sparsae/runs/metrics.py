"""Adding rows to the metrics.jsonl of a run. Needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparsae.files import named, to_json


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

    def cut(self, position: Mapping[str, Any] | None) -> None:
        """Cut back to where a checkpoint was saved (None: to nothing), so that a resumed run writes the rest again."""
        size = position["bytes"] if position else 0
        with named(self._path):
            os.ftruncate(self._file, size)
        self._follow(size)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; numbers that are not finite become null."""
        line = (to_json(row) + "\n").encode()
        with named(self._path):
            left = line
            while left:
                left = left[os.write(self._file, left) :]
        self._digest.update(line)
        self._size += len(line)

    def position(self) -> dict[str, Any]:
        """How long the file is, and the SHA-256 of all of it, which is on disk by then."""
        with named(self._path):
            os.fsync(self._file)
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        os.close(self._file)

    def _follow(self, size: int) -> None:
        self._size, self._digest = size, hashlib.sha256(self._path.read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
