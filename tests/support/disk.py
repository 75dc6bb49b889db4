"""A disk that loses what was not brought to it: what a crash leaves of a directory, at any moment of a program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Image = dict[str, bytes | None]  # a directory's files by their paths; None: a directory


@dataclass
class Disk:
    """Follows everything below `root`, whose own name is on disk.

    After each call that changes names or brings something to disk it keeps what a crash would leave, in two ways: names
    are on disk at once and contents when they are synced, or names too only when their directory is.
    """

    root: Path
    images: list[tuple[str, Image]] = field(default_factory=list)
    _files: dict[int, int] = field(default_factory=dict)  # inode -> our own number of the file, as inodes return
    _synced: dict[int, bytes] = field(default_factory=dict)
    _names: dict[int, dict[str, int]] = field(default_factory=dict)  # directory -> names that are on disk
    _kinds: dict[int, bool] = field(default_factory=dict)  # whether it is a directory
    _count: int = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls inside are followed, those of this process that go through `os`."""
        self._look()
        self._names.setdefault(self._number(self.root), {})
        with pytest.MonkeyPatch.context() as patch:
            for call in ("fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "link", "ftruncate"):
                patch.setattr(os, call, self._followed(call, getattr(os, call)))
            yield

    def _followed(self, call: str, whole: Any) -> Any:
        def made(*given: Any, **named: Any) -> Any:
            done = whole(*given, **named)
            self._look()
            if call == "fsync":
                self._sync(Path(os.readlink(f"/proc/self/fd/{given[0]}")))
            self._keep(call)
            return done

        return made

    def _number(self, path: Path) -> int:
        return self._files[path.lstat().st_ino]

    def _look(self) -> None:
        """Number what is new, and forget inodes that are no more."""
        there = {path.lstat().st_ino: path for path in (self.root, *self.root.rglob("*"))}
        self._files = {inode: number for inode, number in self._files.items() if inode in there}
        for inode, path in there.items():
            if inode not in self._files:
                self._count += 1
                self._files[inode] = self._count
                self._kinds[self._count] = path.is_dir()

    def _sync(self, path: Path) -> None:
        if path != self.root and self.root not in path.parents:
            return
        number = self._number(path)
        if path.is_dir():
            self._names[number] = {entry.name: self._number(entry) for entry in path.iterdir()}
        else:
            self._synced[number] = path.read_bytes()

    def _keep(self, call: str) -> None:
        at_once: Image = {}
        for path in self.root.rglob("*"):
            name = str(path.relative_to(self.root))
            at_once[name] = None if path.is_dir() else self._synced.get(self._number(path), b"")
        late: Image = {}
        self._late(self._number(self.root), "", late)
        for image in (at_once, late):
            if not self.images or all(image != known for _, known in self.images[-2:]):
                self.images.append((call, image))

    def _late(self, directory: int, above: str, image: Image) -> None:
        for name, number in self._names.get(directory, {}).items():
            image[f"{above}{name}"] = None if self._kinds[number] else self._synced.get(number, b"")
            if self._kinds[number]:
                self._late(number, f"{above}{name}/", image)


def lay_out(image: Image, folder: Path) -> None:
    """Make a directory of an image."""
    folder.mkdir()
    for name, content in sorted(image.items()):
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
