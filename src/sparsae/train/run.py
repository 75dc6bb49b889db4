"""A run from its configuration to its directory: `start` and `resume`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.load import resolve, with_absolute_paths
from sparsae.config.schema import Config
from sparsae.data import Batches, Corpus, evenly_spaced, prepare, unigram_perplexity
from sparsae.errors import DivergedError, InputError
from sparsae.optim import AdamW
from sparsae.rules import build_rule
from sparsae.train.assemble import optimizer_of, trainer_of
from sparsae.train.build import build, check, choose_device
from sparsae.train.checkpoint import (
    keep_newest,
    load_checkpoint,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from sparsae.train.claim import claimed, refuse_occupied
from sparsae.train.lock import refuse_ranks
from sparsae.train.loop import Trainer
from sparsae.train.manifest import Manifest
from sparsae.train.memory import forget_peak, keep_freed_memory, out_of_memory_is_told
from sparsae.train.micro_batch import split_held_out
from sparsae.train.progress import Display
from sparsae.train.rundir import MetricsWriter, RunDirectory
from sparsae.train.source import Source, read_source
from sparsae.train.stopping import StopRequest
from sparsae.train.summary import closing, headline, summarize
from sparsae.train.trackers import Trackers, check_installed

_THREADS = 256  # or four for each core: more than that is a slip, and systems refuse to make them


@dataclass(frozen=True, eq=False)
class _Parts:
    """Everything of a run that exists before its directory does."""

    device: torch.device
    corpus: Corpus
    model: nn.Module
    optimizer: AdamW
    batches: Batches
    validation: Tensor
    micro_tokens: Any


@dataclass(frozen=True, eq=False)
class _Saved:
    """A checkpoint that was read."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["trainer"]["step"])

    def file(self, group: str) -> str:
        """The file of a group of tensors, for messages."""
        return str(self.path / f"{group}.safetensors")

    def load_into(self, model: nn.Module, optimizer: AdamW) -> None:
        """InputError where the tensors do not fit."""
        load_model(model, self._group("model"), self.file("model"))
        load_optimizer(model, optimizer, self._group("optimizer"), self.file("optimizer"))

    def _group(self, name: str) -> dict[str, Tensor]:
        if name not in self.tensors:
            raise InputError(f"checkpoint {self.path} has no {name}.safetensors")
        return self.tensors[name]


def start(config: Config, out: Path, quiet: bool = False, source: Path | None = None) -> dict[str, Any]:
    """Train a new run into the directory `out`; returns its summary, also when it was stopped by a signal.

    source: another run, whose weights and topology this one starts from. Raises InputError for anything wrong with the
    configuration, the data, the source or the directory; then nothing is left but what was measured, which is why a run
    that diverged keeps its directory (DivergedError).
    """
    refuse_ranks()
    _check_threads(config)
    refuse_occupied(out, config)
    if source is not None and config.data.tokenizer == "train":
        tokenizer = RunDirectory.open(source).tokenizer
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    config = with_absolute_paths(config)
    taken = None if source is None else read_source(source, config)
    with claimed(out) as claim:
        refuse_occupied(out, config)
        run, display = RunDirectory(out), Display(quiet)
        try:
            parts = _prepare(config, display, taken)
            return _train(parts, run, _begin(run, config, parts, taken), display, None)
        except BaseException:
            claim.undo()
            raise


def resume(path: Path, quiet: bool = False, steps: int | None = None) -> dict[str, Any]:
    """Go on with the run in `path` from its newest checkpoint, as if it had never stopped; returns its summary.

    A run that was stopped before its first checkpoint begins again. steps: train so many steps altogether, more than
    the run was to have: schedules are drawn anew over all of them, and the learning rate rises again over one in a
    hundred of those that were added. Raises InputError where there is no run, where a file of it is damaged or was
    changed, or where the run is finished.
    """
    refuse_ranks()
    run = RunDirectory.open(path)
    _check_steps(run, run.config(), steps)
    with claimed(path):
        run, display = RunDirectory.open(path), Display(quiet)
        config, manifest = run.config(), run.manifest()
        _check_steps(run, config, steps)
        saved = None
        if run.saved_steps():
            assert manifest is not None
            saved = _read_checkpoint(run, manifest, extending=steps is not None and steps > config.training.steps)
            if config.training.threads is None:
                # The order of sums, and so the last bit, can depend on the number of threads.
                torch.set_num_threads(saved.state["threads"])
        elif manifest is not None and (manifest.started_from or manifest.extensions):
            raise InputError(f"{path}: this run's checkpoint is gone: restore it, or start a new run")
        parts = _prepare(config, display)
        if saved is None:
            manifest = _begin(run, config, parts, None)
        elif parts.corpus.digest != saved.state["corpus"]:
            raise InputError(
                f"{path}: the text of data.source has changed since the run began; restore it, or start a new run"
            )
        assert manifest is not None
        if steps is not None and steps > config.training.steps:
            manifest = manifest.extended(saved.step if saved else 0, steps)
        return _train(parts, run, manifest, display, saved)


def _check_steps(run: RunDirectory, config: Config, steps: int | None) -> None:
    planned = config.training.steps
    if steps is not None and steps < planned:
        raise InputError(f"{run.path}: --steps {steps} is fewer than the {planned} of this run, which can only grow")
    summary = run.outcome(run.summary) if run.summary.exists() else {}
    if summary.get("finished") and summary.get("steps") == planned == (steps or planned):
        raise InputError(
            f"{run.path}: this run is finished: all {planned} steps are done (train it longer: --steps N with N above "
            f"{planned})"
        )


def _check_threads(config: Config) -> None:
    threads, cores = config.training.threads, os.cpu_count() or 1
    if threads is not None and threads > max(_THREADS, 4 * cores):
        raise InputError(f"training.threads {threads}: this machine has {cores} cores; give at most so many, or null")


def _read_checkpoint(run: RunDirectory, manifest: Manifest, extending: bool) -> _Saved:
    # Going on from an earlier one ends the same; where more steps begin is part of what the run is.
    checkpoint = run.latest_checkpoint(or_earlier=not extending)
    run.check_tokenizer()
    tensors, state = load_checkpoint(checkpoint)
    saved = _Saved(checkpoint, tensors, state)
    extended = manifest.extensions[-1].step if manifest.extensions else 0
    if saved.step < extended:
        raise InputError(f"checkpoint {checkpoint} is older than step {extended}, where this run got more steps")
    return saved


def _prepare(config: Config, display: Display, source: Source | None = None) -> _Parts:
    _check_threads(config)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    device = choose_device(config.training.device)
    check_installed(config.tracking)
    check(config)
    corpus = prepare(config.data, display.stage)
    display.close()
    display.say(corpus.held_out)
    context = config.model.context
    reported, micro = split_held_out(corpus.validation, context)
    batches = Batches(corpus.train, context, config.training.batch_size, config.seed)
    validation = evenly_spaced(reported, context, config.training.validation_sequences)
    if reported is micro and build_rule(config.topology, config.rules).micro_batch:
        display.say(
            "warning: the held-out text is too short to be divided: candidates are scored on the validation text"
        )
    with out_of_memory_is_told("the model"):
        model = build(config, corpus.vocab_size, corpus.tokenizer.eos_id, device)
    if source is not None:
        source.load_into(model, corpus.tokenizer)
    keep_freed_memory(device)
    forget_peak(device)
    optimizer = optimizer_of(model, config)
    return _Parts(device, corpus, model, optimizer, batches, validation, micro)


def _begin(run: RunDirectory, config: Config, parts: _Parts, source: Source | None) -> Manifest:
    """Write what a run has before it is trained, the manifest first: without it nothing here is known to be a run."""
    manifest = Manifest(config, started_from=source.record if source else None)
    manifest.write(run.path)
    manifest.write_config(run.config_file)
    parts.corpus.tokenizer.save(run.tokenizer)
    manifest = manifest.with_tokenizer(run.tokenizer)
    manifest.write(run.path)
    return manifest


def _go_on(run: RunDirectory, manifest: Manifest, metrics: MetricsWriter, saved: _Saved | None) -> None:
    """Nothing is wrong with what was read: from here on the directory is that of a run that goes on."""
    if manifest != run.manifest():  # it was extended
        manifest.write(run.path)
    if resolve(run.config_file) != manifest.config:
        manifest.write_config(run.config_file)
    for outcome in (run.summary, run.sample):
        outcome.unlink(missing_ok=True)
    metrics.cut(saved.state["metrics"] if saved else None)


def _train(
    parts: _Parts, run: RunDirectory, manifest: Manifest, display: Display, saved: _Saved | None
) -> dict[str, Any]:
    config, began = manifest.config, time.perf_counter()
    unigram = unigram_perplexity(parts.corpus.train_counts, parts.validation[:, 1:])
    if saved is not None:
        saved.load_into(parts.model, parts.optimizer)
        run.check_metrics(saved.state["metrics"])
    trackers = Trackers(config.tracking, run.path, config.model_dump(mode="json"))
    diverged: DivergedError | None = None
    with contextlib.closing(trackers), MetricsWriter(run.metrics) as metrics:
        trainer = trainer_of(
            config,
            parts.model,
            parts.optimizer,
            parts.batches,
            parts.validation,
            parts.micro_tokens,
            metrics,
            trackers,
            display,
            parts.device,
            manifest.extensions[-1] if manifest.extensions else None,
        )
        if saved is not None:
            _restore(trainer, saved)
        _go_on(run, manifest, metrics, saved)
        display.say(headline(config, parts.model, len(parts.corpus.train), unigram))
        previous = float(saved.state["elapsed"]) if saved else 0.0

        def elapsed() -> float:
            return previous + time.perf_counter() - began

        def save() -> None:
            with trainer.watch.of("checkpoint"):
                _save(trainer, run, manifest.run, parts.corpus.digest, metrics, elapsed())

        if saved is None and manifest.started_from:
            save()  # from here on the run needs the other one no more
        try:
            with StopRequest().listening() as stop, out_of_memory_is_told("training"):
                trainer.run(stop, save)
        except DivergedError as error:
            diverged = error
            metrics.write({"kind": "diverged", "step": error.step, "tokens": trainer.tokens, "reason": error.reason})
        summary = summarize(manifest, trainer, unigram, elapsed(), metrics.position(), diverged)
    run.write_json("summary.json", summary)
    if diverged is not None:
        raise diverged
    display.say(closing(summary, run))
    return summary


def _save(trainer: Trainer, run: RunDirectory, name: str, corpus: str, metrics: MetricsWriter, elapsed: float) -> None:
    tensors = {
        "model": model_tensors(trainer.model),
        "optimizer": optimizer_tensors(trainer.model, trainer.optimizer),
    }
    state: dict[str, Any] = {
        "run": name,
        "trainer": trainer.state(),
        "metrics": metrics.position(),
        "corpus": corpus,
        "threads": torch.get_num_threads(),
        "elapsed": elapsed,
    }
    if trainer.sparsifier:
        state["search"], tensors["search"] = trainer.sparsifier.state()
    if trainer.teacher:
        tensors["teacher"] = model_tensors(trainer.teacher.model)
    _require_finite(trainer, tensors)
    save_checkpoint(run.checkpoint(trainer.step), tensors, state)
    keep_newest(run.checkpoints, trainer.settings.keep_checkpoints, name)


def _require_finite(trainer: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A checkpoint of numbers that are none must not take the place of a good one."""
    for group, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise trainer.diverged(f"{name} of the {group} is not finite")


def _restore(trainer: Trainer, saved: _Saved) -> None:
    """What is beside model and optimizer."""
    tensors, state = saved.tensors, saved.state
    for name, part in {"teacher": trainer.teacher, "search": trainer.sparsifier}.items():
        if (part is not None) != (name in tensors):
            raise InputError(f"checkpoint {saved.path} and the settings of the run disagree about {name}")
    try:
        if trainer.teacher:
            load_model(trainer.teacher.model, tensors["teacher"], saved.file("teacher"))
            trainer.teacher.reconnect(trainer.model)
        if trainer.sparsifier:
            try:
                trainer.sparsifier.restore(state["search"], tensors["search"])
            except InputError as error:  # which knows of no file
                raise InputError(f"checkpoint {saved.path} does not fit this run: {error}") from None
        trainer.restore(state["trainer"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"checkpoint {saved.path}: state.json or search.safetensors does not fit this run: {error!r}"
        ) from None
