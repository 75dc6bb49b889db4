"""The outcome of a run, as summary.json has it, and a sample of its text; docs/configuration.md explains the keys.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsae.core.record import decode
from sparsae.files import read_json
from sparsae.runs.manifest import Extension, SettingChange
from sparsae.runs.metrics import Position


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a run diverged: `reason` is what was not finite."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run `run`, in the directory `path`, whose weights after `step` another one began with."""

    path: str
    run: str | None  # None: a directory of transformers', which is no run
    step: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run that ended or was stopped. What has a default was not written by earlier versions."""

    preset: str
    method: str
    seed: int
    steps: int
    ranks: int = 1
    steps_skipped: int = 0
    tokens: int
    parameters_dense: int
    parameters: int
    sparsity: float
    nnz: int
    nnz_target: int
    validation_loss: float
    validation_perplexity: float
    test_loss: float | None = None
    teacher_validation_loss: float | None
    unigram_perplexity: float
    untrained_perplexity: float
    train_flops: int
    train_flops_by_part: Mapping[str, int]
    train_flops_dense_equivalent: int
    study_flops: int = 0
    state_bytes_sparse_layers: int
    state_bytes_by_part: Mapping[str, int]
    state_bytes_sparse_layers_dense_equivalent: int
    telemetry_bytes: int
    peak_memory_bytes: int
    tokens_per_second: float | None
    flops_per_second: float | None = None
    mfu: float | None = None
    topology_updates: int
    topology_updates_accepted: int
    seconds: float
    seconds_by_part: Mapping[str, float]
    finished: bool
    diverged: Divergence | None = None
    started_from: Origin | None = None
    extensions: tuple[Extension, ...] = ()
    changes: tuple[SettingChange, ...] = ()
    metrics: Position | None = None
    device: str
    torch: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How the trained model, and its teacher where it has one, continues a prompt."""

    prompt: str
    text: str
    teacher_text: str | None


def read_summary(file: Path) -> Summary:
    """A summary.json, whoever's it is. InputError where it is damaged."""
    return decode(Summary, read_json(file), str(file))
