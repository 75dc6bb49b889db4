"""The examples of a task: from a folder of files, or from a dataset of the Hugging Face Hub.

A folder holds `train` and a validation split as .jsonl (compressed or not) or .parquet, in the Hub's form too
(`train-00000-of-00001.parquet`), either itself or below the task's name. Where it has no validation split, about a
tenth of the training examples is held out by a fixed rule: those whose first text has a digest that ten divides.
Examples of one premise, passage or sentence are then on one side, and no order of the file and no seed changes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from sparsae.data.readers import Remote, json_rows, parquet_objects, streamed_objects
from sparsae.errors import InputError
from sparsae.files import expanded
from sparsae.tasks.catalogue import Example, Task

HELD_OUT = 10
"""One example of so many is held out where there is no validation split."""

HUB = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+$")
_VALIDATION = ("validation", "valid", "val", "dev")
_VARIANTS = ("", "matched", "mismatched")


@dataclass(frozen=True)
class TaskData:
    """What a task is trained on and scored on; `validations` has one entry, or one for each variant by name.

    held_out: whether validation is a part of the training split. available: training examples before a limit.
    digest: the same for the same examples.
    """

    task: Task
    train: Sequence[Example]
    validations: Mapping[str, Sequence[Example]]
    held_out: bool
    available: int
    digest: str


def read_task(task: Task, source: str, max_examples: int | None = None) -> TaskData:
    """The examples of a task from a folder, or from `hf:ORG/NAME[@REVISION]` (`hf:` alone: the suites' own place).

    max_examples: so many for training are drawn, the same for every seed. Raises InputError where there are none, or
    a row is no example of the task.
    """
    splits = _remote(task, source) if source.startswith("hf:") else _local(task, source)
    train = _examples(task, splits.pop("train"))
    validations = {name.partition("_")[2]: _examples(task, rows) for name, rows in splits.items()}
    held_out = not validations
    if held_out:
        validations = {"": [example for example in train if _is_held_out(example)]}
        train = [example for example in train if not _is_held_out(example)]
    if empty := [name for name, examples in {"train": train, **validations}.items() if not examples]:
        raise InputError(f"{source}: task {task.name} has no {empty[0] or 'validation'} example")
    available = len(train)
    if max_examples is not None and available > max_examples:
        train = Random(0).sample(train, max_examples)
    return TaskData(task, train, validations, held_out, available, _digest(train, validations))


def _is_held_out(example: Example) -> bool:
    digest = blake2b(example.key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % HELD_OUT == 0


def _digest(train: Sequence[Example], validations: Mapping[str, Sequence[Example]]) -> str:
    found = blake2b(digest_size=16)
    for name, examples in (("train", train), *validations.items()):
        found.update(repr((name, [(e.texts, e.label, e.group) for e in examples])).encode(errors="surrogatepass"))
    return found.hexdigest()


def _examples(task: Task, rows: Generator[tuple[str, Any]]) -> list[Example]:
    examples: list[Example] = []
    with closing(rows):
        for where, row in rows:
            if not isinstance(row, Mapping):
                raise InputError(f"{where}: a {type(row).__name__}, not a JSON object with the fields of {task.name}")
            examples += task.read(row, where)
    return examples


def _remote(task: Task, source: str) -> dict[str, Generator[tuple[str, Any]]]:
    name, _, revision = (source.removeprefix("hf:") or HUB[task.suite]).partition("@")
    splits = ["train", *(f"validation_{v}" for v in _VARIANTS[1:])] if task.name == "mnli" else ["train", "validation"]
    return {split: streamed_objects(Remote(name, task.name, split, revision or None)) for split in splits}


def _local(task: Task, source: str) -> dict[str, Generator[tuple[str, Any]]]:
    root = Path(expanded(source))
    if not root.is_dir():
        raise InputError(f"{source}: no such directory; give one with {task.name}/train.jsonl, or hf:")
    folder = root / task.name if (root / task.name).is_dir() else root
    files = _files(folder)
    if "train" not in files:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise InputError(
            f"{folder}: no train.jsonl or train.parquet of task {task.name} (there are: {there}); "
            f"give a folder that has one, or has a folder {task.name}"
        )
    found = {"train": _rows(files["train"])}
    for variant in _VARIANTS:
        suffix = f"_{variant}" if variant else ""
        names = [f"{name}{suffix}" for name in _VALIDATION if f"{name}{suffix}" in files]
        if len(names) > 1:
            raise InputError(f"{folder}: has both {names[0]} and {names[1]}: leave one of them there")
        if names:
            found[f"validation{suffix}"] = _rows(files[names[0]])
    return found


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split, shards in their order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is not None and os.path.isfile(path):
            found.setdefault(_SHARD.sub("", path.name.removesuffix(suffix)), []).append(path)
    for name, paths in found.items():
        if len(paths) > 1 and any(not _SHARD.search(path.name.split(".", 1)[0]) for path in paths):
            raise InputError(f"{folder}: {name} is there twice, as {paths[0].name} and {paths[1].name}: leave one")
    return found


def _rows(paths: Sequence[Path]) -> Generator[tuple[str, Any]]:
    for path in paths:
        yield from parquet_objects(path) if path.name.endswith(".parquet") else json_rows(path)
