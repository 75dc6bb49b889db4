"""The files of runs and experiments are written and read in one way: by their classes, in modules that are theirs."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sparsae
from sparsae.core.record import field_names
from sparsae.experiments import jobs
from sparsae.experiments.compare import record as compare
from sparsae.experiments.coordinates import record as coordinates
from sparsae.experiments.transfer import record as transfer
from sparsae.runs import rows as run_rows
from sparsae.runs import summary
from sparsae.search import rows as search_rows
from sparsae.tasks import record as tasks

SOURCE = Path(sparsae.__file__).parent
TREES = {str(file.relative_to(SOURCE)): ast.parse(file.read_text("utf-8")) for file in sorted(SOURCE.rglob("*.py"))}

# Where a file's name stands is where it is written and read.
HOMES = {
    "metrics.jsonl": {"runs/directory.py"},
    "summary.json": {"runs/directory.py"},
    "sample.json": {"runs/directory.py"},
    "diverged.json": {"experiments/jobs.py"},
    "results.json": {
        "experiments/directory.py",
        "tasks/study.py",
    },  # of experiments, of tasks
    "coordinates.json": {"experiments/coordinates/experiment.py"},
    "sparsity.json": {"report/essential.py"},
}

# What makes JSON of objects and objects of JSON, and the modules that may: each for files or lines of its own.
JSON = {"loads", "load", "dumps", "dump", "parse_json", "read_json", "read_sealed", "write_sealed", "sealed", "to_json"}
MAKERS = {
    "files.py", "runs/metrics.py", "runs/directory.py", "runs/summary.py", "experiments/directory.py",
    "experiments/page.py", "experiments/jobs.py", "experiments/coordinates/experiment.py",
    "report/essential.py",  # files of records
    "runs/manifest.py", "runs/checkpoint.py", "integrations/checkpoint.py",  # manifest.json, state.json
    "nn/stored/saving.py",  # config.json of a model
    "data/corpus.py", "data/readers.py", "data/tokenizer.py", "data/bpe.py", "data/entry.py",  # text, its cache
    "config/narrow.py",  # settings
    "experiments/workers.py", "experiments/worker.py", "experiments/cluster.py",  # lines between processes
    "cli/output.py", "cli/bench.py", "bench/memory.py", "bench/step.py",  # --json, and lines between processes
    "core/ranks.py", "train/joining.py",  # between ranks
    "cli/schema.py",  # schemas of settings
    "evaluate/formats/compact.py", "evaluate/formats/semi_structured.py", "evaluate/formats/header.py",  # of exports
    "runs/recognized.py", "train/pretrained.py",  # what transformers and its Trainer wrote
    "tasks/study.py",  # results of tasks
    "search/guests.py",  # whether a rule's state can be saved
}  # fmt: skip

# Folders that read records and nothing else that is made of keys; plan files and settings are pydantic's.
READERS = (
    "report/",
    "experiments/",
    "evaluate/card.py",
    "runs/directory.py",
    "train/summary.py",
    "cli/experiments.py",
    "cli/tasks.py",
    "tasks/",
)


def records(*modules: ModuleType) -> Iterator[type]:
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                yield value


RECORDS = [
    *records(search_rows, run_rows, summary, compare, coordinates, transfer, tasks), jobs.Failure,
]  # fmt: skip
# A plan's keys (`Asked`) are settings too, and are looked up as such.
FIELDS = {name for kind in RECORDS if not kind.__name__.startswith("Asked") for name in field_names(kind)}


def constants(tree: ast.Module) -> Iterator[str]:
    """Texts in code, not those of documentation."""
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


@pytest.mark.parametrize("name", HOMES)
def test_a_file_has_one_home(name: str) -> None:
    found = {file for file, tree in TREES.items() if name in constants(tree)}
    assert found == HOMES[name]


def test_json_is_made_where_files_or_lines_of_it_are() -> None:
    found = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                owner = function.value if isinstance(function, ast.Attribute) else None
                if name in JSON and (owner is None or (isinstance(owner, ast.Name) and owner.id == "json")):
                    found.add(file)
    assert found <= MAKERS, "read and write by a class of records (sparsae.core.record), or say here what file it is"
    assert found >= MAKERS, "these make no JSON any more"


def keys_read(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Constants that something is looked up by."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") != "Literal":
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0] if node.args else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value, node.lineno


# Keys of what is no record.
EXCEPTIONS = {
    "experiments/compare/tasks.py": {"score"},  # metrics by their names
    "tasks/page.py": {"score"},
    "tasks/study.py": {"score", "made_with"},  # before it is known whether this version wrote the rest
    "tasks/catalogue.py": {"questions", "text"},  # fields of the examples
    "tasks/finetune.py": {"topology"},  # settings
    "experiments/grid.py": {"heads"},
    "experiments/kind.py": {"kind"},
    "experiments/registry.py": {"kind"},
    "experiments/cluster.py": {"finished"},  # a worker's answers
    "experiments/workers.py": {"finished"},
    "experiments/worker.py": {"finished"},
    "experiments/compare/ranking.py": {"cross_entropy"},  # terms of a score
    "runs/directory.py": {"best", "metrics", "run", "step"},  # of a checkpoint's state.json
}
EARLIER = "experiments/compare/earlier.py"  # which knows what other versions wrote


@pytest.mark.parametrize("file", [file for file in TREES if file.startswith(READERS) and file != EARLIER])
def test_what_records_hold_is_not_looked_up_by_keys(file: str) -> None:
    allowed = EXCEPTIONS.get(file, set())
    found = {key for key, _ in keys_read(TREES[file]) if key in FIELDS}
    assert found == allowed


def test_what_is_told_of_runs_is_said_by_a_class() -> None:
    """Rows go to observers and into the file as they are: no module makes one of keys."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                assert not {"kind", "step"} <= keys, f"{file}: line {node.lineno}"


def test_every_class_of_records_can_be_read() -> None:
    assert len(RECORDS) > 30
    assert {"validation_loss", "learning_rate", "hamming_start", "curve", "share_within", "by_seed"} <= FIELDS
