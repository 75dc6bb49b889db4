"""The header of an export: its format, and the digests of its other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsae.config.complaints import shown
from sparsae.errors import InputError
from sparsae.files import read_sealed, sha256_of


def read_header(file: Path, version: int) -> dict[str, Any]:
    """What it says. Raises InputError where it or a file that it names is missing, damaged, or of another version."""
    content = read_sealed(file)
    if content.get("format") != version:
        raise InputError(f"{file}: has format {shown(content.get('format'))}: this version reads {version}")
    for name, expected in content["files"].items():
        other = file.parent / name
        if not other.is_file() or sha256_of(other) != expected:
            raise InputError(f"{other}: is missing or was changed: the export is damaged")
    return content
