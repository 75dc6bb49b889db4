"""Data of the task files in this folder, read from files below the directory that the variable EVAL names.

EVAL/blimp/*.jsonl, EVAL/lambada/lambada_development_plain_text.txt, EVAL/arc_easy/{train,val}.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from sparsae.files import expanded


def blimp(**_: Any) -> dict[str, Dataset]:
    """Every pair of every paradigm that is there; as each has as many, accuracy is also the mean over paradigms."""
    rows = [row for path in _files("blimp", "*.jsonl") for row in _rows(path)]
    return {"validation": _dataset(rows, "sentence_good", "sentence_bad", "UID")}


def lambada(**_: Any) -> dict[str, Dataset]:
    """Passages whose last word is asked for, tokenized as they were published."""
    (path,) = _files("lambada", "lambada_development_plain_text.txt")
    return {"validation": _dataset([{"text": line} for line in path.read_text("utf-8").splitlines() if line], "text")}


def arc_easy(**_: Any) -> dict[str, Dataset]:
    """Questions with three to five answers; the two files have the two forms in which they were published."""
    return {
        "train": _dataset(_questions("train"), "question", "answers", "right"),
        "validation": _dataset(_questions("val"), "question", "answers", "right"),
    }


def _questions(split: str) -> list[dict[str, Any]]:
    (path,) = _files("arc_easy", f"{split}.jsonl")
    found = []
    for row in _rows(path):
        choices = row["choices"]
        if isinstance(choices, dict):
            found.append({**row, "answers": choices["text"], "right": choices["label"].index(row["answerKey"])})
        else:
            found.append({**row, "answers": choices, "right": row["gold"]})
    return found


def _files(folder: str, pattern: str) -> list[Path]:
    found = sorted(Path(expanded("${EVAL}"), folder).glob(pattern))
    if not found:
        raise FileNotFoundError(f"{expanded('${EVAL}')}/{folder}/{pattern}: not there")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _dataset(rows: list[dict[str, Any]], *names: str) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in names} for row in rows])
