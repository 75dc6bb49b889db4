"""The directory of a run: where each of its files lies, and how they are written so that none is ever half there.

    config.yaml  metrics.jsonl  tokenizer/  checkpoints/step-00000250/  summary.json  sample.json  report.html

Needs no torch, so that `sparsae info` and `sparsae report` answer at once.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.errors import InputError

_CHECKPOINT = re.compile(r"step-(\d+)")


class RunDirectory:
    """The paths of a run, and its small files. Making one touches nothing; see `create` and `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.sample = path / "sample.json"
        self.report = path / "report.html"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path) -> Self:
        """Makes the directory of a new run. InputError if something is there already or it cannot be written."""
        refuse_occupied(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot make this directory: {error.strerror}; choose another") from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{path}: no permission to write here; choose another directory")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The directory of a run that exists. InputError if there is none."""
        if not path.is_dir():
            what = "not a directory" if path.exists() else "no such directory"
            raise InputError(f"{path}: {what}; give the directory of a run, such as runs/demo-sparsae-1")
        run = cls(path)
        if not run.config_file.is_file():
            raise InputError(f"{path}: not the directory of a run: it has no config.yaml")
        return run

    def config(self) -> Config:
        """The run's settings. InputError if config.yaml cannot be read or is not valid."""
        return resolve(self.config_file)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies, whether it exists or not."""
        return self.checkpoints / f"step-{step:08d}"

    def saved_steps(self) -> list[int]:
        """Steps that have a whole checkpoint (one with its state.json, which is written last), lowest first."""
        if not self.checkpoints.is_dir():
            return []
        names = [_CHECKPOINT.fullmatch(entry.name) for entry in self.checkpoints.iterdir()]
        steps = sorted(int(name[1]) for name in names if name)
        return [step for step in steps if (self.checkpoint(step) / "state.json").is_file()]

    def latest_checkpoint(self) -> Path:
        """The checkpoint of the highest step. InputError if there is none."""
        steps = self.saved_steps()
        if not steps:
            raise InputError(f"{self.path}: this run has no checkpoint yet; train it first")
        return self.checkpoint(steps[-1])

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line that was torn by a crash is left out.

        InputError if another line is not a row.
        """
        return [row for _, row in self._metrics_lines()]

    def truncate_metrics(self, step: int) -> None:
        """Drops the rows after a step, and a torn last line, so that a resumed run can write them again."""
        if self.metrics.exists():
            kept = [line for line, row in self._metrics_lines() if row.get("step", 0) <= step]
            write_atomically(self.metrics, "".join(line + "\n" for line in kept))

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file of the run, whole or not at all."""
        write_atomically(self.path / name, to_json(value, indent=2) + "\n")

    def _metrics_lines(self) -> list[tuple[str, dict[str, Any]]]:
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text("utf-8", errors="replace").split("\n")
        if lines[-1] == "":
            lines.pop()
        rows: list[tuple[str, dict[str, Any]]] = []
        for number, line in enumerate(lines, start=1):
            row = _parse_row(line)
            if row is not None:
                rows.append((line, row))
            elif number < len(lines):
                raise InputError(f"{self.metrics}: line {number} is not a row of metrics; the file is damaged")
        return rows


class MetricsWriter:
    """Adds rows to a metrics.jsonl, each flushed at once, so that others can follow the run."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; numbers that are not finite become null."""
        self._stream.write(to_json(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def refuse_unwritable(option: str, file: str | None) -> None:
    """InputError if the file that an option names could not be written; "-" is standard output, None is no file."""
    if file is None or file == "-":
        return
    folder = Path(file).parent
    if Path(file).is_dir():
        raise InputError(f"{option}: {file} is a directory; give a file")
    if not folder.is_dir():
        raise InputError(f"{option}: no directory {folder}; give a file in one that exists")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option}: no permission to write in {folder}; give a file elsewhere")


def refuse_occupied(path: Path) -> None:
    """InputError if a new run cannot go to this path because something is there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; give a new directory")
    try:
        occupied = path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot read this directory: {error.strerror}; choose another") from None
    if occupied and (path / "config.yaml").is_file():
        raise InputError(
            f"{path}: holds a run already; give a new directory, or continue that run with --resume {path}"
        )
    if occupied:
        raise InputError(f"{path}: is not empty; give a new directory")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. InputError if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: not JSON; the file is damaged") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; the file is damaged")
    return value


def to_json(value: object, indent: int | None = None) -> str:
    """JSON without NaN or infinities, which it has no words for: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def describe(path: Path) -> dict[str, Any]:
    """What is known of a run: its settings by name, how far it came, and its summary or else its latest metrics.

    InputError if there is no run at the path.
    """
    run = RunDirectory.open(path)
    config = run.config()
    steps = run.saved_steps()
    known: dict[str, Any] = {
        "run": str(path),
        "preset": config.preset,
        "method": config.method,
        "seed": config.seed,
        "sparsity": config.sparsity.sparsity,
        "steps_planned": config.training.steps,
        "checkpoint_step": steps[-1] if steps else None,
        "finished": False,
    }
    if run.summary.is_file():
        return known | read_json(run.summary)
    latest = {row.get("kind"): row for row in run.read_metrics()}
    training, validation = latest.get("train", {}), latest.get("validation", {})
    return known | {
        "steps": training.get("step", 0),
        "tokens": training.get("tokens", 0),
        "nnz": training.get("nnz"),
        "validation_loss": validation.get("loss"),
        "validation_perplexity": validation.get("perplexity"),
    }


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
