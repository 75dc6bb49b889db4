"""Where text comes from: the standard library's source, files, or a Hugging Face dataset, as one stream of documents.

A source is named by one string (`DataConfig.source`). It is resolved when it is opened, so that a missing file is an
error before anything is read; documents are then streamed, never held together. Empty documents are left out.
"""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from sparsae.config.data import STDLIB
from sparsae.data.readers import Remote, decoded, json_lines, parquet_rows, plain_text, streamed_rows
from sparsae.errors import InputError
from sparsae.files import expanded

ONE_DOCUMENT = (".txt", ".md", ".py")
JSON_LINES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*ONE_DOCUMENT, *JSON_LINES, ".parquet")

_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Opened:
    """A source whose name has been resolved: files, or a dataset in the form of the Hugging Face Hub's."""

    name: str
    root: Path
    files: tuple[Path, ...] = ()
    remote: Remote | None = None

    @property
    def is_stdlib(self) -> bool:
        return self.name == STDLIB


def documents(source: str, text_field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """The documents of `source`, in an order that does not change, at most `max_documents` of them.

    `source` is `stdlib`; a file, a directory or a glob of .txt, .py, .md (a file is a document), .jsonl[.xz|.gz|.zst]
    (a line is a document) and .parquet (a row is a document); or `hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]`, where a
    folder in the Hub's form may stand for its name. A directory is read with its subdirectories; hidden ones, links to
    directories (which a glob follows) and files of other suffixes are not. A plain file of more than 16 MiB is several
    documents, cut where lines end. `text_field` names the field or column with the text of lines and rows; null there
    is no document. Raises InputError, at once for what does not exist and when it is reached for what cannot be read.
    """
    opened = open_source(source)
    return islice((text for text in _texts(opened, text_field) if text and not text.isspace()), max_documents)


def fingerprint(source: str) -> dict[str, str | int]:
    """What identifies the present content of `source` without reading it: names, sizes and times of its files.

    The standard library is told by Python's version and the sizes of its files; a dataset of the Hub by its name and
    revision alone, so that what is kept of it stays in use when the Hub's copy changes. Raises InputError as
    `documents` does.
    """
    opened = open_source(source)
    if opened.remote is not None and not opened.files:
        return {"source": source}
    digest = blake2b(sys.version.encode() if opened.is_stdlib else b"", digest_size=16)
    size = 0
    for path in opened.files:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        name = path.relative_to(opened.root) if opened.is_stdlib else path
        time = 0 if opened.is_stdlib else status.st_mtime_ns
        digest.update(repr((os.fspath(name), status.st_size, time)).encode())
        size += status.st_size
    return {"source": source, "files": len(opened.files), "bytes": size, "digest": digest.hexdigest()}


def expected_documents(source: str, max_documents: int | None = None) -> int | None:
    """How many documents `source` has at most, for a progress display; None where only reading would tell."""
    opened = open_source(source)
    if opened.remote is None and all(path.name.endswith(ONE_DOCUMENT) for path in opened.files):
        return len(opened.files) if max_documents is None else min(len(opened.files), max_documents)
    return max_documents


def open_source(source: str) -> Opened:
    """Resolve the name of a source; raises InputError where nothing readable bears it."""
    if source == STDLIB:
        return _standard_library()
    if source.startswith("hf:"):
        return _remote(source)
    path = Path(expanded(source))  # which leaves the name of nobody's home as it is
    if os.path.isfile(path):
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{source}: unknown suffix; readable are {_listed(SUFFIXES)}")
        files = [path]
    elif source and os.path.isdir(path):
        files = _readable(_walk(path, set()))
        if not files:
            raise InputError(f"{source}: no file in this directory ends in {_listed(SUFFIXES)}")
    elif glob.has_magic(source):
        matched = [Path(name) for name in glob.glob(os.fspath(path), recursive=True)]
        files = _readable(match for match in matched if os.path.isfile(match))
        if not files:
            reason = f"none of its {len(matched)} matches ends in {_listed(SUFFIXES)}" if matched else "nothing matches"
            raise InputError(f"{source}: {reason}")
    else:
        raise InputError(
            f"{source or '(nothing)'}: no such file or directory; give stdlib, a path, a glob, or hf:ORG/NAME"
        )
    return Opened(source, path, tuple(file.absolute() for file in files))


def _texts(opened: Opened, text_field: str) -> Iterator[str]:
    if opened.remote is not None:
        yield from streamed_rows(opened.remote, text_field)
        return
    for path in opened.files:
        if path.name.endswith(JSON_LINES):
            yield from json_lines(path, text_field)
        elif path.name.endswith(".parquet"):
            yield from parquet_rows(path, text_field)
        elif opened.is_stdlib:
            yield from _decodable(path)
        else:
            yield from plain_text(path)


def _decodable(path: Path) -> Iterator[str]:
    """The text of a file of the standard library, unless its encoding is another one (a few are, on purpose)."""
    try:
        yield decoded(path)
    except UnicodeDecodeError:
        return


def _standard_library() -> Opened:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in _walk(root, _NOT_STDLIB) if path.suffix == ".py")
    if not files:
        raise InputError(f"stdlib: {root} holds no .py file; this Python comes without its source, give another source")
    return Opened(STDLIB, root, tuple(files))


def _remote(source: str) -> Opened:
    place, *rest = source.removeprefix("hf:").split(":")
    folder = Path(expanded(place))
    is_folder = os.path.isdir(folder)
    name, mark, revision = (os.fspath(folder), "", "") if place and is_folder else place.partition("@")
    if not name or len(rest) > 2 or (mark and not revision):
        raise InputError(f"{source}: a Hugging Face dataset is given as hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]")
    configuration, split = [*rest, "", ""][:2]
    remote = Remote(name, configuration or None, split or "train", revision or None)
    files = sorted(_walk(folder, set())) if is_folder else []
    return Opened(source, folder, tuple(file.absolute() for file in files), remote)


def _walk(root: Path, without: set[str]) -> Iterator[Path]:
    """Every file under `root`, hidden names, links to directories and those named in `without` left out."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _readable(paths: Iterable[Path]) -> list[Path]:
    # A pattern with two ** matches a file several times.
    return sorted({path for path in paths if path.name.endswith(SUFFIXES)})


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
