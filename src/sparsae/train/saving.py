"""A run and its checkpoints: which of its parts have a state, and how they get it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.nn.tensors import load_model, model_tensors
from sparsae.runs.checkpoint import (
    joined,
    keep_newest,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    split,
)
from sparsae.runs.directory import RunDirectory, metrics_position
from sparsae.runs.manifest import Manifest
from sparsae.runs.metrics import MetricsWriter, Position
from sparsae.train.loop import Trainer


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A checkpoint that was read."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that were done."""
        return int(self.state["trainer"]["step"])

    @property
    def metrics(self) -> Position:
        """Where metrics.jsonl ended."""
        return metrics_position(self.path, self.state)

    def load_into(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """InputError where the tensors do not fit."""
        load_model(model, self._group("model"), self._file("model"))
        load_optimizer(model, optimizer, self._group("optimizer"), self._file("optimizer"))

    def restore(self, trainer: Trainer) -> None:
        """What is beside model and optimizer. InputError where it does not fit."""
        tensors, state = self.tensors, self.state
        for name, part in {"teacher": trainer.teacher, "search": trainer.sparsifier}.items():
            if (part is not None) != (name in tensors or name in state):
                raise InputError(f"checkpoint {self.path} and the settings of the run disagree about {name}")
        try:
            teacher = None
            if trainer.teacher:
                kept = joined(state.get("teacher", {}), tensors.get("ages", {}))
                teacher = kept | {"model": tensors.get("teacher")}
            try:
                if trainer.sparsifier:
                    search = joined(state["search"], tensors["search"])
                    trainer.sparsifier.load_state_dict(search | {"teacher": teacher})
                elif trainer.teacher is not None and teacher is not None:
                    trainer.teacher.load_state_dict(teacher)
            except InputError as error:  # which knows of no file
                raise InputError(f"checkpoint {self.path} does not fit this run: {error}") from None
            trainer.load_state_dict(state["trainer"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"checkpoint {self.path}: state.json or search.safetensors does not fit this run: {error!r}"
            ) from None
        best = trainer.validation.best
        if best is not None and trainer.settings.keep_best and not self._of_step(best[0]).exists():
            # From before the best one was to be kept: the best of those that can be is looked for.
            trainer.validation.best = None

    def _of_step(self, step: int) -> Path:
        """The run's checkpoint of another step, whether it exists or not."""
        return RunDirectory(self.path.parents[1]).checkpoint(step)

    def _file(self, group: str) -> str:
        """The file of a group of tensors, for messages."""
        return str(self.path / f"{group}.safetensors")

    def _group(self, name: str) -> dict[str, Tensor]:
        if name not in self.tensors:
            raise InputError(f"checkpoint {self.path} has no {name}.safetensors")
        return self.tensors[name]


def read_saved(run: RunDirectory, manifest: Manifest, extending: bool) -> SavedRun:
    """The checkpoint from which a run continues. InputError where it is damaged, or older than what the run became."""
    # Continuing from an earlier one ends the same; where more steps begin is part of what the run is.
    checkpoint = run.latest_checkpoint(or_earlier=not extending)
    run.require_tokenizer()
    saved = SavedRun(checkpoint, *load_checkpoint(checkpoint))
    extended = manifest.extensions[-1].step if manifest.extensions else 0
    if saved.step < extended:
        raise InputError(f"checkpoint {checkpoint} is older than step {extended}, where this run got more steps")
    return saved


class Saver:
    """Writes the checkpoints of a run, and forgets those that are too many.

    Where the settings want it, a thread writes them from a copy in memory while training continues: one at a time, and
    each is advertised when it is whole, as ever. The copy costs as many bytes as the checkpoint has.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunDirectory,
        name: str,
        corpus: str,
        metrics: MetricsWriter,
        elapsed: Callable[[], float],
    ) -> None:
        """name: the run's. corpus: the digest of its text. elapsed: seconds that it has taken."""
        self._trainer, self._run, self._name, self._corpus = trainer, run, name, corpus
        self._metrics, self._elapsed = metrics, elapsed
        self._beside = ThreadPoolExecutor(1, "checkpoint") if trainer.settings.checkpoint_async else None
        self._writing: Future[None] | None = None

    def save(self) -> None:
        """The run as it is, once the checkpoint before is whole.

        Raises DivergedError where a tensor is not finite: it must not take the place of a good one. Raises InputError
        where this one, or the one before, cannot be written.
        """
        self.finish()
        tensors, state = self._parts()
        _require_finite(self._trainer, tensors)
        best = self._trainer.validation.best if self._trainer.settings.keep_best else None
        keep = None if best is None else self._run.checkpoint(best[0])
        path = self._run.checkpoint(self._trainer.step)
        if self._beside is None:
            self._write(path, tensors, state, keep)
        else:
            copies = {
                group: {n: t.detach().to("cpu", copy=True) for n, t in of.items()} for group, of in tensors.items()
            }
            self._writing = self._beside.submit(self._write, path, copies, copy.deepcopy(state), keep)

    def finish(self) -> None:
        """Until the last checkpoint is whole. Raises InputError where it cannot be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Whatever is being written is finished first; what happens to it is not told."""
        if self._beside is not None:
            self._beside.shutdown(wait=True)

    def _write(
        self, path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: Path | None
    ) -> None:
        save_checkpoint(path, tensors, state)
        keep_newest(self._run.checkpoints, self._trainer.settings.keep_checkpoints, self._name, keep)

    def _parts(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The tensors and the state of a checkpoint."""
        trainer = self._trainer
        tensors = {
            "model": model_tensors(trainer.model),
            "optimizer": optimizer_tensors(trainer.model, trainer.optimizer),
        }
        state: dict[str, Any] = {
            "run": self._name,
            "trainer": trainer.state_dict(),
            "metrics": encode(self._metrics.position()),
            "corpus": self._corpus,
            "threads": torch.get_num_threads(),
            "elapsed": self._elapsed(),
        }
        if trainer.sparsifier:
            # The teacher has a file of its own, from which it can be evaluated.
            state["search"], tensors["search"] = split(trainer.sparsifier.state_dict() | {"teacher": None})
        if trainer.teacher:
            teacher = trainer.teacher.state_dict()
            if (average := teacher.pop("model")) is not None:
                tensors["teacher"] = average
            state["teacher"], ages = split(teacher)
            if ages:
                tensors["ages"] = ages
        return tensors, state


def _require_finite(trainer: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for group, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise trainer.diverged(f"{name} of the {group} is not finite")
