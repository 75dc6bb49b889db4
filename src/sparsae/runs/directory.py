"""The directory of a run: where each of its files lies, what is in them, and whether it is what was written.

    manifest.json  config.yaml  metrics.jsonl  tokenizer/  checkpoints/step-00000250/  summary.json  sample.json
    report.html

Needs no torch, so that `sparsae info` and `sparsae report` answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from sparsae.config import Config
from sparsae.config.complaints import shown
from sparsae.config.load import resolve
from sparsae.core.record import decode, encode
from sparsae.errors import InputError
from sparsae.files import read_json, read_sealed, sha256_of, write_sealed
from sparsae.runs.manifest import NAME, Manifest
from sparsae.runs.metrics import Position, read_rows
from sparsae.runs.recognized import is_run, what_is
from sparsae.runs.rows import Row, TrainRow, ValidationRow
from sparsae.runs.summary import Sample, Summary

CHECKPOINT_FORMAT = 3
AnyRow = TypeVar("AnyRow", bound=Row)
Anything = TypeVar("Anything")
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
            raise InputError(f"{path}: not the directory of a run: {what_is(path)}")
        return run

    def begun(self) -> bool:
        """Whether this is the directory of a run."""
        return is_run(self.path)

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

    def config(self, allowed: Collection[str] = ()) -> Config:
        """The run's settings. InputError if they cannot be read, are not valid, or are not what the run began with.

        allowed: keys of which config.yaml may have other values; these are then the settings.
        """
        manifest = self.manifest()
        if manifest is None:
            return resolve(self.config_file)
        if not self.config_file.exists() and not self.measured():  # a run that was killed while it began
            return manifest.config
        return manifest.validated_config(self.config_file, allowed)

    def require_tokenizer(self) -> None:
        """InputError where the tokenizer is not the one that the run began with."""
        manifest = self.manifest()
        if manifest is not None:
            manifest.require_tokenizer(self.tokenizer)

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
        return self.steady(lambda: self._latest(or_earlier))

    def steady(self, read: Callable[[], Anything]) -> Anything:
        """What is read of the newest checkpoint, read again where a training that goes on has replaced it meanwhile."""
        while True:
            before = self.saved_steps()
            try:
                return read()
            except (InputError, FileNotFoundError):
                if self.saved_steps() == before:
                    raise

    def _latest(self, or_earlier: bool) -> Path:
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

    def best_checkpoint(self) -> Path:
        """That of the best validation, of a run that keeps it (training.keep_best). InputError where there is none."""
        self.latest_checkpoint()  # has to be whole
        step = self.best_step()
        if step is None:
            raise InputError(f"{self.path}: this run keeps no best checkpoint: train it with training.keep_best=true")
        return self.checkpoint(step)

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None where the run keeps none, or has none yet."""
        state = self.newest_state() if self.config().training.keep_best else None
        best = state["trainer"].get("validation", {}).get("best") if state else None
        return None if best is None else int(best[0])

    def newest_state(self) -> dict[str, Any] | None:
        """The state.json of the newest checkpoint; None where there is none. Raises InputError as `read_state` does."""

        def read() -> dict[str, Any] | None:
            steps = self.saved_steps()
            return read_state(self.checkpoint(steps[-1])) if steps else None

        return self.steady(read)

    def _known_steps(self) -> list[int]:
        """Steps that have, or by the summary had, a checkpoint, whole or not."""
        names = [_CHECKPOINT.fullmatch(entry.name) for entry in self.checkpoints.iterdir()]
        summary = self.read_summary()
        finished = summary.steps if summary and not summary.diverged else 0
        return [0, finished, *(int(name[1]) for name in names if name)]

    def read_summary(self) -> Summary | None:
        """What `write_summary` wrote; None where it has not yet. InputError where it is damaged, or another run's."""
        return decode(Summary, self._own(self.summary), str(self.summary)) if self.summary.is_file() else None

    def read_sample(self) -> Sample | None:
        """As `read_summary`."""
        return decode(Sample, self._own(self.sample), str(self.sample)) if self.sample.is_file() else None

    def write_summary(self, summary: Summary) -> None:
        """With the run's name and a seal, whole or not at all."""
        self._write(self.summary, encode(summary))

    def write_sample(self, sample: Sample) -> None:
        """As `write_summary`."""
        self._write(self.sample, encode(sample))

    def _own(self, file: Path) -> dict[str, Any]:
        manifest = self.manifest()
        if manifest is None:
            return read_json(file)
        value = read_sealed(file)
        if value.pop("run_id", None) != manifest.run:
            raise InputError(f"{file}: is one of another run: restore this run's own, or remove it")
        return value

    def read_metrics(self, kind: type[AnyRow], *more: type[AnyRow]) -> list[AnyRow]:
        """The rows of these kinds (`Row`: of all) in metrics.jsonl; a last line that was torn by a crash is left out.

        InputError if another line is not a row, or the rows up to the summary or else the last checkpoint are not what
        was written.
        """
        if summary := self.read_summary():
            self.require_metrics(summary.metrics, whole=True)
        elif self.saved_steps():
            self.require_metrics(self.steady(self._saved_position))
        found: Iterator[Any] = read_rows(self.metrics, (kind, *more)) if self.metrics.exists() else iter(())
        return list(found)

    def _saved_position(self) -> Position:
        checkpoint = self._latest(or_earlier=True)
        return metrics_position(checkpoint, read_state(checkpoint))

    def _write(self, file: Path, value: Mapping[str, Any]) -> None:
        manifest = self.manifest()
        write_sealed(file, {**value, "run_id": manifest.run} if manifest else value)

    def require_metrics(self, position: Position | None, whole: bool = False) -> None:
        """InputError where the rows up to a position (whole: all there are) are not what was written."""
        if position is None:
            return
        size = self.metrics.stat().st_size if self.metrics.is_file() else 0
        if size < position.bytes:
            raise InputError(f"{self.metrics}: rows are missing; restore the file")
        if (whole and size > position.bytes) or sha256_of(self.metrics, position.bytes) != position.sha256:
            raise InputError(f"{self.metrics}: was changed since it was written; restore the file")


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


def metrics_position(checkpoint: Path, state: Mapping[str, Any]) -> Position:
    """Where metrics.jsonl ended when a checkpoint was saved, from its state.json."""
    return decode(Position, state["metrics"], f"checkpoint {checkpoint}: state.json: metrics")


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
        "unit": config.sparsity.unit_name,
        "steps_planned": config.training.steps,
        "checkpoint_step": steps[-1] if steps else None,
        "best_step": run.best_step(),
        "finished": False,
    }
    if summary := run.read_summary():
        return known | encode(summary)
    rows: list[Row] = run.read_metrics(TrainRow, ValidationRow)
    trained = next((row for row in reversed(rows) if isinstance(row, TrainRow)), None)
    validated = next((row for row in reversed(rows) if isinstance(row, ValidationRow)), None)
    return known | {
        "steps": trained.step if trained else 0,
        "tokens": trained.tokens if trained else 0,
        "nnz": trained.nnz if trained else None,
        "validation_loss": validated.loss if validated else None,
        "validation_perplexity": validated.perplexity if validated else None,
    }
