"""One reader for each form of text: plain files, JSON lines (compressed too), parquet, Hugging Face streams.

Each turns every way in which its input can be wrong into one InputError that names the file and the place, and none
holds more than a document and a block of its file in memory, whatever the file unpacks to. Whoever raises while it
reads closes what it reads from: the error keeps all frames alive, and open files in them.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsae.errors import InputError

LONGEST_DOCUMENT = 2**26
"""Bytes of the longest line, characters of the longest text of a row; what is longer is no collection of documents."""

SECTION = 2**24
"""Characters after which a plain file goes on as another document."""

_EXTRA = "pip install 'sparsae[data]'"
_ROWS = 256
_PACKED = 2**10
_OPEN: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def plain_text(path: Path) -> Iterator[str]:
    """The text of a file in UTF-8, without a byte order mark; of a long one, one section after the other.

    A section ends where a line does, if one does in it.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, read = "", 0
    try:
        with path.open("rb") as file:
            while block := file.read(SECTION):
                read += len(block)
                rest += decoder.decode(block)
                if len(rest) >= SECTION:
                    end = rest.rfind("\n") + 1 or len(rest)
                    yield rest[:end]
                    rest = rest[end:]
            yield rest + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = read - len(error.object) + error.start
        raise InputError(f"{path}: not UTF-8 (byte {place}); convert the file to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def decoded(path: Path) -> str:
    """The whole text of a short file; raises UnicodeDecodeError where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def json_lines(path: Path, text_field: str) -> Iterator[str]:
    """The field `text_field` of every line's JSON object; blank lines are passed over."""
    return _texts_of(json_rows(path), text_field)


def json_rows(path: Path) -> Generator[tuple[str, Any]]:
    """(its place, its JSON value) of every line that is not blank."""
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise InputError(f"{where}: not UTF-8; convert the file to UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not a JSON object: {error}") from None
            yield where, row


def parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    """The column `text_field` of a parquet file, read one row group at a time."""
    return _texts_of(parquet_objects(path, text_field), text_field)


def parquet_objects(path: Path, field: str | None = None) -> Generator[tuple[str, dict[str, Any]]]:
    """(its place, its columns) of every row, of one column where a field is named, read one row group at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: {_EXTRA}") from None
    try:
        with pyarrow.OSFile(os.fspath(path)) as stream, parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise InputError(f"{path}: {_no_field(field, names)}")
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=None if field is None else [field]):
                for value in batch.to_pylist():
                    row += 1
                    yield f"{path}: row {row}", value
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 in field {field!r}" if field else f"{path}: not UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file: {_first_line(error)}") from None


@dataclass(frozen=True)
class Remote:
    """A part of a dataset on the Hugging Face Hub, at a commit, tag or branch (None: the newest), or of a folder."""

    name: str
    configuration: str | None
    split: str
    revision: str | None = None


def streamed_rows(remote: Remote, text_field: str) -> Iterator[str]:
    """The field `text_field` of the rows of a dataset, streamed: the data is never held, on disk or in memory."""
    return _texts_of(streamed_objects(remote), text_field)


def streamed_objects(remote: Remote) -> Generator[tuple[str, Any]]:
    """(its place, its columns) of every row of a dataset, streamed likewise."""
    source = f"hf:{remote.name}" + (f"@{remote.revision}" if remote.revision else "")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: reading it needs the library datasets: {_EXTRA}") from None
    try:
        with _quiet_hub():
            load = functools.partial(datasets.load_dataset, remote.name, remote.configuration, revision=remote.revision)
            rows = iter(load(split=remote.split, streaming=True))
            number = 0
            while (row := next(rows, None)) is not None:
                number += 1
                yield f"{source}: row {number}", row
    except ConnectionError:
        raise InputError(
            f"{source}: the Hugging Face Hub cannot be reached; check the network or give a file"
        ) from None
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read: {_first_line(error)}") from None


def _lines(path: Path) -> Generator[bytes]:
    number = 0
    try:
        with closing(_lines_of(_zstandard_chunks(path)) if path.suffix == ".zst" else _lines_in(path)) as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 - read below
                if len(line) > LONGEST_DOCUMENT:
                    break
                yield line
            else:
                return
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: damaged compressed file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    raise InputError(f"{path}:{number}: {_too_long('line', 'bytes')}")


def _lines_in(path: Path) -> Generator[bytes]:
    """Lines with their ends; of one that is too long, only as much as shows it."""
    with _OPEN.get(path.suffix, open)(path, "rb") as file:
        yield from iter(lambda: file.readline(LONGEST_DOCUMENT + 2), b"")


def _zstandard_chunks(path: Path) -> Generator[bytes]:
    """The content of a .zst file of one frame or several; raises EOFError where the last one is cut short.

    The library's own stream reader ends a truncated file in silence.
    """
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: reading .zst needs zstandard: {_EXTRA}") from None
    frame = None
    with path.open("rb") as file:
        # What is given at once is unpacked at once, to 30,000 times its size at worst.
        while chunk := file.read(_PACKED):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    if "memory" in str(error):
                        raise InputError(
                            f"{path}: its window is larger than 128 MiB: pack it again with at most zstd --long=27"
                        ) from None
                    raise InputError(f"{path}: damaged compressed file: {error}") from None
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def _lines_of(chunks: Generator[bytes]) -> Generator[bytes]:
    """Lines without their ends; of one that is too long, only as much as shows it."""
    rest: list[bytes] = []
    held = 0
    with closing(chunks):
        for chunk in chunks:
            *ended, last = chunk.split(b"\n")
            for line in ended:
                yield b"".join((*rest, line))
                rest, held = [], 0
            rest.append(last)
            held += len(last)
            if held > LONGEST_DOCUMENT:
                break
    yield b"".join(rest)


def _texts_of(rows: Generator[tuple[str, Any]], text_field: str) -> Iterator[str]:
    with closing(rows):
        for where, row in rows:
            yield from _text_of(row, text_field, where)


def _text_of(row: Any, text_field: str, where: str) -> Iterator[str]:
    """The text of one row: one string, or none where the field is null."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not a JSON object with the field {text_field!r}")
    if text_field not in row:
        raise InputError(f"{where}: {_no_field(text_field, list(row))}")
    text = row[text_field]
    if text is None:
        return
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} is of type {type(text).__name__}, not a string")
    if len(text) > LONGEST_DOCUMENT:
        raise InputError(f"{where}: {_too_long('text', 'characters')}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {text_field!r} holds half of a surrogate pair, not Unicode text") from None
    yield text


def _too_long(what: str, unit: str) -> str:
    return f"a {what} of more than {LONGEST_DOCUMENT:,} {unit}; divide it into documents"


def _no_field(text_field: str, names: list[str]) -> str:
    present = ", ".join(str(name)[:40] for name in names[:8]) or "none"
    return f"no field {text_field!r} (there are: {present}); name the field with data.text_field"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The Hub's client logs every retry; without a network one line of ours says it all."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
