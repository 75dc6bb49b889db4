"""The model of a run, read back from its newest checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparsae.config.schema import Config
from sparsae.data import Tokenizer, load_tokenizer
from sparsae.errors import InputError
from sparsae.evaluate.formats.compact import is_compact, read_compact
from sparsae.kernels.processor import set_up_processor
from sparsae.nn.tensors import load_model
from sparsae.runs.checkpoint import load_checkpoint
from sparsae.runs.directory import RunDirectory, read_state
from sparsae.search.teacher import STORAGES
from sparsae.train.model import choose_device, model_of


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run's model in evaluation mode on `device`, its tokenizer, the step that it was saved at,
    and the digest of the corpus that it was trained on."""

    run: RunDirectory
    config: Config
    model: nn.Module
    tokenizer: Tokenizer
    device: torch.device
    step: int
    corpus: str


def load_run(path: Path, teacher: bool = False, best: bool = False) -> LoadedRun:
    """The student, or the teacher, of the run in `path`; torch computes with the run's training.threads from then on.

    `path` may be a compact export of one of them as well. best: of the checkpoint with the best validation, not of the
    newest.

    Raises InputError where there is no run, no checkpoint or no teacher, and where the checkpoint is damaged.
    """
    if is_compact(path):
        if best:
            raise InputError(f"{path}: an export holds one model: leave out --best, or name the run")
        return _load_compact(path, teacher)
    run = RunDirectory.open(path)
    config = run.config()
    if teacher and not config.teacher.enabled:
        raise InputError(f"{path}: this run kept no teacher (teacher.enabled is false): leave out --teacher")
    return run.steady(lambda: _loaded(run, config, teacher, best))


def _loaded(run: RunDirectory, config: Config, teacher: bool, best: bool) -> LoadedRun:
    checkpoint = run.best_checkpoint() if best else run.latest_checkpoint()
    if teacher and config.teacher.start and "teacher.safetensors" not in read_state(checkpoint)["files"]:
        raise InputError(
            f"{run.path}: this run's teacher has not begun (teacher.start): train it on, or leave out --teacher"
        )
    group = "teacher" if teacher else "model"
    tensors, state = load_checkpoint(checkpoint, group)
    run.require_tokenizer()
    tokenizer = load_tokenizer(run.tokenizer)
    device = _device(config)
    model = model_of(config, tokenizer.vocab_size, tokenizer.eos_id, device)
    if teacher:
        STORAGES[config.teacher.storage].prepare(model)
    load_model(model, tensors[group], str(checkpoint / f"{group}.safetensors"))
    model.requires_grad_(False).eval()
    return LoadedRun(run, config, model, tokenizer, device, int(state["trainer"]["step"]), state["corpus"])


def _load_compact(path: Path, teacher: bool) -> LoadedRun:
    if teacher:
        raise InputError(f"{path}: an export holds one model: leave out --teacher, or name the run")
    held = read_compact(path)
    tokenizer, device = load_tokenizer(held.tokenizer), _device(held.config)
    model = model_of(held.config, tokenizer.vocab_size, tokenizer.eos_id, device)
    if held.teacher:
        STORAGES[held.config.teacher.storage].prepare(model)
    load_model(model, held.tensors, str(path))
    model.requires_grad_(False).eval()
    return LoadedRun(RunDirectory(path), held.config, model, tokenizer, device, held.step, held.corpus)


def _device(config: Config) -> torch.device:
    # At most one for each core: a run may come from a larger machine.
    threads = config.training.threads
    set_up_processor(None if threads is None else min(threads, os.cpu_count() or 1))
    return choose_device("auto" if config.training.device.startswith("cuda") else config.training.device)
