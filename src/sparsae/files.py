"""Files that are whole or not there, and errors that name them.

A file is written under a name of its own that nobody could have planted, brought to disk, and renamed. JSON that a
program reads again is *sealed*: it carries the SHA-256 of the rest of itself, so that a changed byte is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from sparsae.errors import InputError

SEAL = "sha256"
_LARGEST_JSON = 64_000_000  # bytes
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.(?:tmp|partial)")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


# Bytes of a name to which a temporary one can be made: most file systems take 255.
_LONGEST = 255 - len(f".{'.' + token_hex(8)}.partial")


def temporary_name(path: Path, kind: str = "tmp") -> Path:
    """A name beside `path` that is nobody's; `is_temporary` knows it again after a crash."""
    return path.with_name(f".{path.name}.{token_hex(8)}.{kind}")


def is_temporary(path: Path) -> bool:
    """Whether a name is one that `temporary_name` gave."""
    return _TEMPORARY.fullmatch(path.name) is not None


def expanded(path: str) -> str:
    """A path with the user's home in place of ~ and variables of the environment in place of ${NAME}.

    The one form of a variable is chosen so that a lone $ in a file's name stays what it is. InputError where a variable
    is not set.
    """

    def value(found: re.Match[str]) -> str:
        if not (set_to := os.environ.get(found[1])):
            raise InputError(f"{path}: the environment has no {found[1]}; set it: export {found[1]}=DIRECTORY")
        return set_to

    return os.path.expanduser(_VARIABLE.sub(value, path))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part; no link is followed.

    What is no regular file (a device, a pipe) is written to as it is.
    """
    if path.exists() and not path.is_file():
        with named(path):
            path.write_text(text, encoding="utf-8")
        return
    temporary = temporary_name(path)
    with named(path):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o666), "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def open_as_directory(path: Path) -> None:
    """Let everybody read or write a file who may its directory; libraries that write their own make it private."""
    with named(path):
        path.chmod(path.parent.stat().st_mode & 0o666)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to disk."""
    with named(path):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the operating system inside name this file, also those of calls that know a descriptor only."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        error.filename2 = None
        raise


def sha256_of(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes."""
    with named(path), path.open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256()
        while size and (block := file.read(min(size, 2**20))):
            found.update(block)
            size -= len(block)
        return found.hexdigest()


def to_json(value: object, indent: int | None = None) -> str:
    """JSON without NaN or infinities, which it has no words for: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def parse_json(text: str | bytes, origin: str) -> Any:
    """A JSON value; `origin` names it in the InputError that anything unreadable raises."""
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{origin}: JSON that is nested too deeply; the file is damaged") from None
    except ValueError:
        raise InputError(f"{origin}: not JSON; the file is damaged") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, without its seal.

    InputError if it cannot be read, is something else, or has a seal and is not what was sealed.
    """
    value = _read_object(path)
    if SEAL in value and not is_whole(value):
        raise InputError(f"{path}: was changed since it was written; the file is damaged")
    value.pop(SEAL, None)
    return value


def read_sealed(path: Path) -> dict[str, Any]:
    """As `read_json`; one without a seal is damaged too."""
    if SEAL not in _read_object(path):
        raise InputError(f"{path}: has no {SEAL}; the file is damaged, or of another version of sparsae")
    return read_json(path)


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal, whole or not at all."""
    write_atomically(path, sealed(value, indent=2) + "\n")


def sealed(value: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object as text, with its seal at the end."""
    return to_json(with_seal(value), indent)


def with_seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object and its seal."""
    return {**value, SEAL: _seal(json.loads(to_json(value)))}


def is_whole(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object has a seal, and is what was sealed."""
    return bool(value.get(SEAL) == _seal({key: entry for key, entry in value.items() if key != SEAL}))


def refuse_unwritable(option: str, file: str | None) -> None:
    """InputError if the file that an option names could not be written; "-" is standard output, None is no file."""
    if file is None or file == "-":
        return
    folder = Path(file).parent
    if Path(file).is_dir():
        raise InputError(f"{option}: {file} is a directory; give a file")
    if not folder.is_dir():
        raise InputError(f"{option}: no directory {folder}; give a file in one that exists")
    if len(os.fsencode(Path(file).name)) > _LONGEST:
        raise InputError(
            f"{option}: a name of {len(os.fsencode(Path(file).name))} bytes is too long; give a shorter one"
        )
    if Path(file).exists() and not Path(file).is_file():
        if not os.access(file, os.W_OK):  # a device or a pipe, which is written to as it is
            raise InputError(f"{option}: no permission to write to {file}; give a file elsewhere")
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option}: no permission to write in {folder}; give a file elsewhere")


def refuse_file(option: str, folder: Path | None) -> None:
    """InputError if the directory that an option names, which may have to be made, is a file; None is none."""
    if folder is not None and (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise InputError(f"{option}: {folder} is a file; give a directory")


def holds_files(path: Path, but: str) -> bool:
    """Whether the directory at a path holds anything but a file of this name and what a crash left.

    InputError where it is a file or cannot be read, and where it is to be made, or written into, and cannot be.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; give a new directory")
    try:
        if path.is_dir() and not all(entry.name == but or is_temporary(entry) for entry in path.iterdir()):
            return True
    except OSError as error:
        raise InputError(f"{path}: cannot read this directory: {error.strerror}; choose another") from None
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise InputError(f"{path}: cannot make this directory: {there} is no directory; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no permission to write in {there}; choose another directory")
    return False


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    if len(content) > _LARGEST_JSON:
        raise InputError(f"{path}: longer than the {_LARGEST_JSON:,} bytes that it may have; the file is damaged")
    value = parse_json(content, str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; the file is damaged")
    return value


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
