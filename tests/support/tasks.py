"""A run that takes a second and the smallest tasks that can be learnt from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = ("list", "item", "part", "colour")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentiment(count: int, first: int = 0) -> list[dict[str, Any]]:
    """SST-2's form: the class is whether the sentence ends in good or bad."""
    return [
        {"sentence": f"{WORDS[n % 4]} {n} is {'good' if n % 3 else 'bad'}", "label": int(n % 3 > 0)}
        for n in range(first, first + count)
    ]
