"""The directory of a run: where each of its files lies, what is in them, and whether it is what was written.

    manifest.json  config.yaml  metrics.jsonl  tokenizer/  checkpoints/step-00000250/  summary.json  sample.json
    report.html

Needs no torch, so that `sparsae info` and `sparsae report` answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from sparsae.config import Config
from sparsae.config.complaints import shown
from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.files import named, read_json, read_sealed, sha256_of, write_sealed
from sparsae.runs.manifest import NAME, Manifest

CHECKPOINT_FORMAT = 3
_CHECKPOINT = re.compile(r"step-(\d+)")


class RunDirectory:
    """The paths of a run, and its small files. Making one touches nothing; see `open`."""

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
    def open(cls, path: Path) -> Self:
        """The directory of a run that exists. InputError if there is none."""
        if not path.is_dir():
            what = "not a directory" if path.exists() else "no such directory"
            raise InputError(f"{path}: {what}; give the directory of a run, such as runs/demo-sparsae-1")
        run = cls(path)
        if not run.begun():
            raise InputError(f"{path}: not the directory of a run: it has no config.yaml")
        return run

    def begun(self) -> bool:
        """Whether this is the directory of a run."""
        return self.config_file.is_file() or (self.path / NAME).is_file()

    def measured(self) -> bool:
        """Whether there are results that cannot be had again without training."""
        written = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return written or self.summary.exists() or bool(self.saved_steps())

    def manifest(self) -> Manifest | None:
        """The run's manifest; None in a directory that has settings only. InputError where it is damaged or lost."""
        manifest = Manifest.read(self.path)
        if manifest is None and self.saved_steps():
            raise InputError(
                f"{self.path / NAME}: is missing, or this run is of another version of sparsae: restore it"
            )
        return manifest

    def config(self) -> Config:
        """The run's settings. InputError if they cannot be read, are not valid, or are not what the run began with."""
        manifest = self.manifest()
        if manifest is None:
            return resolve(self.config_file)
        if not self.config_file.exists() and not self.measured():  # a run that was killed while it began
            return manifest.config
        return manifest.checked_config(self.config_file)

    def check_tokenizer(self) -> None:
        """InputError where the tokenizer is not the one that the run began with."""
        manifest = self.manifest()
        if manifest is not None:
            manifest.check_tokenizer(self.tokenizer)

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

    def latest_checkpoint(self, or_earlier: bool = False) -> Path:
        """The checkpoint of the highest step.

        InputError if there is none, it is another run's, or (unless an earlier one will do, to go on from) a later one
        was there that is gone or torn.
        """
        steps = self.saved_steps()
        if not steps:
            raise InputError(f"{self.path}: this run has no checkpoint yet; train it first")
        checkpoint, manifest = self.checkpoint(steps[-1]), self.manifest()
        state = read_state(checkpoint)
        if manifest is not None and state["run"] != manifest.run:
            raise InputError(f"checkpoint {checkpoint} is one of another run: restore this run's own, or remove it")
        if state["trainer"]["step"] != steps[-1]:
            raise InputError(f"checkpoint {checkpoint} is one of step {state['trainer']['step']}: give it its own name")
        latest = steps[-1] if or_earlier else max(steps[-1], *self._known_steps())
        if latest > steps[-1]:
            raise InputError(
                f"checkpoint {self.checkpoint(latest)} is gone or damaged: state.json cannot be read; restore it, or "
                f"train it again from step {steps[-1]}: --resume {self.path}"
            )
        return checkpoint

    def _known_steps(self) -> list[int]:
        """Steps that have, or by the summary had, a checkpoint, whole or not."""
        names = [_CHECKPOINT.fullmatch(entry.name) for entry in self.checkpoints.iterdir()]
        summary = self.outcome(self.summary) if self.summary.is_file() else {}
        finished = summary.get("steps", 0) if not summary.get("diverged") else 0
        return [0, int(finished), *(int(name[1]) for name in names if name)]

    def outcome(self, file: Path) -> dict[str, Any]:
        """What `write_json` wrote. InputError where it is damaged, or another run's."""
        manifest = self.manifest()
        if manifest is None:
            return read_json(file)
        value = read_sealed(file)
        if value.pop("run_id", None) != manifest.run:
            raise InputError(f"{file}: is one of another run: restore this run's own, or remove it")
        return value

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line that was torn by a crash is left out.

        InputError if another line is not a row, or the rows up to the summary or else the last checkpoint are not what
        was written.
        """
        if self.summary.is_file():
            self.check_metrics(self.outcome(self.summary).get("metrics"), whole=True)
        elif self.saved_steps():
            self.check_metrics(read_state(self.latest_checkpoint(or_earlier=True))["metrics"])
        return self._rows()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file of the run with the run's name and a seal, whole or not at all."""
        manifest = self.manifest()
        write_sealed(self.path / name, {**value, "run_id": manifest.run} if manifest else value)

    def check_metrics(self, position: Mapping[str, Any] | None, whole: bool = False) -> None:
        """InputError where the rows up to a position (whole: all there are) are not what was written."""
        if not position:
            return
        size = self.metrics.stat().st_size if self.metrics.is_file() else 0
        if size < position["bytes"]:
            raise InputError(f"{self.metrics}: rows are missing; restore the file")
        if (whole and size > position["bytes"]) or sha256_of(self.metrics, position["bytes"]) != position["sha256"]:
            raise InputError(f"{self.metrics}: was changed since it was written; restore the file")

    def _rows(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        with named(self.metrics):
            lines = self.metrics.read_text("utf-8", errors="replace").split("\n")
        if lines[-1] == "":
            lines.pop()
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            row = _parse_row(line)
            if row is not None and rows and _step(row) < _step(rows[-1]):
                raise InputError(f"{self.metrics}: line {number} goes back in steps; the file is damaged")
            if row is not None:
                rows.append(row)
            elif number < len(lines):
                raise InputError(f"{self.metrics}: line {number} is not a row of metrics; the file is damaged")
        return rows


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. InputError where it cannot be read, was changed, or is of another version."""
    try:
        state = read_sealed(checkpoint / "state.json")
    except InputError as error:
        if not (checkpoint / "state.json").is_file():
            raise InputError(f"checkpoint {checkpoint} is damaged: state.json cannot be read") from None
        raise InputError(f"checkpoint {checkpoint} is damaged: state.json cannot be read ({error})") from None
    if state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            f"checkpoint {checkpoint} has format {shown(state.get('format'))}: this version reads format "
            f"{CHECKPOINT_FORMAT}"
        )
    kinds = {"run": str, "files": dict, "trainer": dict, "metrics": dict, "corpus": str, "threads": int}
    wrong = next((name for name, kind in kinds.items() if not isinstance(state.get(name), kind)), None)
    if wrong is not None or not isinstance(state["trainer"].get("step"), int):
        raise InputError(f"checkpoint {checkpoint} is damaged: state.json has no {wrong or 'trainer.step'}")
    return state


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
        return known | run.outcome(run.summary)
    latest = {row.get("kind"): row for row in run.read_metrics()}
    training, validation = latest.get("train", {}), latest.get("validation", {})
    return known | {
        "steps": training.get("step", 0),
        "tokens": training.get("tokens", 0),
        "nnz": training.get("nnz"),
        "validation_loss": validation.get("loss"),
        "validation_perplexity": validation.get("perplexity"),
    }


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
