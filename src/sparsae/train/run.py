"""A run from its configuration to its directory: `start` and `resume`."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.load import dump
from sparsae.config.schema import Config
from sparsae.core.accounting import DENSE_BYTES_PER_WEIGHT
from sparsae.data import Batches, Corpus, evenly_spaced, prepare, unigram_perplexity
from sparsae.errors import InputError, require_utf8
from sparsae.nn.linear import sparse_layers
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
from sparsae.train.loop import StopRequest, Trainer, perplexity
from sparsae.train.memory import forget_peak, keep_freed_memory, peak_bytes
from sparsae.train.micro_batch import split_held_out
from sparsae.train.progress import Display, readable_perplexity
from sparsae.train.rundir import MetricsWriter, RunDirectory, read_json, refuse_occupied
from sparsae.train.trackers import Trackers, check_installed


@dataclass(frozen=True, eq=False)
class _Parts:
    """Everything of a run that exists before its directory does."""

    config: Config
    device: torch.device
    corpus: Corpus
    model: nn.Module
    optimizer: AdamW
    batches: Batches
    validation: Tensor
    micro_tokens: Any


def start(config: Config, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Train a new run into the directory `out`; returns its summary, also when it was stopped by a signal.

    Raises InputError for anything wrong with the configuration, the data or the directory, before anything is written.
    """
    refuse_occupied(out)
    config = with_absolute_paths(config)
    display = Display(quiet)
    parts = _prepare(config, display)
    existed = out.exists()
    run = RunDirectory.create(out)
    try:
        run.config_file.write_text(dump(config), encoding="utf-8")
        parts.corpus.tokenizer.save(run.tokenizer)
        return _train(parts, run, display, checkpoint=None)
    except InputError:
        if not run.saved_steps():
            # Nothing was trained that could be gone on with: leave the place as it was.
            for path in [run.path] if not existed else list(run.path.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def resume(path: Path, quiet: bool = False) -> dict[str, Any]:
    """Go on with the run in `path` from its newest checkpoint, as if it had never stopped; returns its summary.

    Raises InputError where there is no run or no checkpoint, where either is damaged, or where the run is finished.
    """
    run = RunDirectory.open(path)
    config = run.config()
    checkpoint = run.latest_checkpoint()
    if run.summary.exists() and read_json(run.summary).get("finished"):
        raise InputError(f"{path}: this run is finished: all {config.training.steps} steps are done")
    _, state = load_checkpoint(checkpoint, "model")
    if config.training.threads is None:
        # The order of sums, and so the last bit, can depend on the number of threads.
        torch.set_num_threads(state["threads"])
    display = Display(quiet)
    parts = _prepare(config, display)
    if parts.corpus.digest != state["corpus"]:
        raise InputError(
            f"{path}: the text of data.source has changed since the run began; restore it, or start a new run"
        )
    return _train(parts, run, display, checkpoint)


def _prepare(config: Config, display: Display) -> _Parts:
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
    if reported is micro and build_rule(config.topology).micro_batch:
        display.say(
            "warning: the held-out text is too short to be divided: candidates are scored on the validation text"
        )
    model = build(config, corpus.vocab_size, corpus.tokenizer.eos_id, device)
    keep_freed_memory(device)
    forget_peak(device)
    optimizer = optimizer_of(model, config)
    return _Parts(config, device, corpus, model, optimizer, batches, validation, micro)


def _train(parts: _Parts, run: RunDirectory, display: Display, checkpoint: Path | None) -> dict[str, Any]:
    config, began = parts.config, time.perf_counter()
    unigram = unigram_perplexity(parts.corpus.train_counts, parts.validation[:, 1:])
    saved_state: dict[str, Any] | None = None
    if checkpoint is not None:
        tensors, saved_state = load_checkpoint(checkpoint)
        load_model(parts.model, tensors["model"])
        load_optimizer(parts.model, parts.optimizer, tensors["optimizer"])
        # A run that was stopped before its first step writes the rows of step 0 again.
        run.truncate_metrics(saved_state["trainer"]["step"] or -1)
        run.summary.unlink(missing_ok=True)
    trackers = Trackers(config.tracking, run.path, config.model_dump(mode="json"))
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
        )
        if saved_state is not None:
            _restore(trainer, tensors, saved_state)
        display.say(_headline(parts, unigram))
        previous = float(saved_state["elapsed"]) if saved_state else 0.0

        def save() -> None:
            with trainer.watch.of("checkpoint"):
                _save(trainer, run, parts.corpus.digest, elapsed=previous + time.perf_counter() - began)

        with StopRequest().listening() as stop:
            finished = trainer.run(stop, save)
    summary = _summary(parts, trainer, unigram, finished, previous + time.perf_counter() - began)
    run.write_json("summary.json", summary)
    display.say(_closing(summary, run, stopped_by=stop.signal))
    return summary


def _save(trainer: Trainer, run: RunDirectory, corpus: str, elapsed: float) -> None:
    tensors = {
        "model": model_tensors(trainer.model),
        "optimizer": optimizer_tensors(trainer.model, trainer.optimizer),
    }
    state: dict[str, Any] = {
        "trainer": trainer.state(),
        "corpus": corpus,
        "threads": torch.get_num_threads(),
        "elapsed": elapsed,
    }
    if trainer.sparsifier:
        state["search"], tensors["search"] = trainer.sparsifier.state()
    if trainer.teacher:
        tensors["teacher"] = model_tensors(trainer.teacher.model)
    save_checkpoint(run.checkpoint(trainer.step), tensors, state)
    keep_newest(run.checkpoints, trainer.settings.keep_checkpoints)


def _restore(trainer: Trainer, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    wanted = {"teacher": trainer.teacher, "search": trainer.sparsifier}
    for name, part in wanted.items():
        if (part is not None) != (name in tensors):
            raise InputError(f"config.yaml and the checkpoint disagree about {name}: undo the change to config.yaml")
    if trainer.teacher:
        load_model(trainer.teacher.model, tensors["teacher"])
        trainer.teacher.reconnect(trainer.model)
    if trainer.sparsifier:
        trainer.sparsifier.restore(state["search"], tensors["search"])
    trainer.restore(state["trainer"])


def with_absolute_paths(config: Config) -> Config:
    """A run must be resumable from any directory."""
    data = config.data
    paths = {"source": data.source, "validation_source": data.validation_source, "tokenizer": data.tokenizer}
    paths["cache"] = data.cache
    keep = ("stdlib", "train")
    absolute = {
        key: os.path.abspath(os.path.expanduser(path))
        for key, path in paths.items()
        if path is not None and path not in keep and not path.startswith("hf:")
    }
    for key, path in absolute.items():
        require_utf8(f"data.{key}", path)
    return config.model_copy(update={"data": data.model_copy(update=absolute)})


def _summary(parts: _Parts, trainer: Trainer, unigram: float, finished: bool, seconds: float) -> dict[str, Any]:
    config, model, costs = parts.config, parts.model, trainer.costs
    live = sum(p.numel() for p in model.parameters())
    nnz = sum(layer.topology.nnz for layer in sparse_layers(model).values())
    weights = costs.cost.sparse_weights
    b_out, b_in = config.sparsity.unit
    target = b_out * b_in * round((1.0 - config.sparsity.sparsity) * (weights // (b_out * b_in)))
    training_seconds = trainer.watch.seconds.get("train", 0.0) + trainer.watch.seconds.get("topology", 0.0)
    return {
        "preset": config.preset,
        "method": config.method,
        "seed": config.seed,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "parameters_dense": live - nnz + weights,
        "parameters": live,
        "sparsity": 1.0 - costs.density,
        "nnz": nnz,
        "nnz_target": target,
        "validation_loss": trainer.validation_loss,
        "validation_perplexity": perplexity(trainer.validation_loss),
        "teacher_validation_loss": trainer.teacher_loss,
        "unigram_perplexity": unigram,
        "untrained_perplexity": perplexity(trainer.untrained_loss),
        "train_flops": trainer.flops.total,
        "train_flops_by_part": dict(trainer.flops.parts),
        "train_flops_dense_equivalent": trainer.flops.dense_equivalent,
        "study_flops": trainer.flops.study,
        "state_bytes_sparse_layers": sum(trainer.state_bytes.values()),
        "state_bytes_by_part": trainer.state_bytes,
        "state_bytes_sparse_layers_dense_equivalent": DENSE_BYTES_PER_WEIGHT * weights,
        "telemetry_bytes": trainer.sparsifier.search.telemetry.nbytes() if trainer.sparsifier else 0,
        "peak_memory_bytes": peak_bytes(parts.device),
        "tokens_per_second": trainer.tokens / training_seconds if training_seconds else None,
        "topology_updates": trainer.updates,
        "topology_updates_accepted": trainer.accepted,
        "seconds": seconds,
        "seconds_by_part": trainer.watch.seconds,
        "finished": finished,
        "device": str(parts.device),
        "torch": torch.__version__,
    }


def _headline(parts: _Parts, unigram: float) -> str:
    config, layers = parts.config, sparse_layers(parts.model)
    nnz = sum(layer.topology.nnz for layer in layers.values())
    total = sum(p.numel() for p in parts.model.parameters())
    return (
        f"{config.preset} · {config.method} · "
        f"{total:,} parameters exist, {nnz:,} of them in {len(layers)} sparse layers · "
        f"{len(parts.corpus.train):,} training tokens · a unigram model's perplexity: {readable_perplexity(unigram)}"
    )


def _closing(summary: dict[str, Any], run: RunDirectory, stopped_by: int | None) -> str:
    if stopped_by is not None and not summary["finished"]:
        return f"stopped and saved at step {summary['steps']}; go on with: sparsae train --resume {run.path}"
    return (
        f"validation perplexity {readable_perplexity(summary['validation_perplexity'])} "
        f"(unigram {readable_perplexity(summary['unigram_perplexity'])}, "
        f"untrained {readable_perplexity(summary['untrained_perplexity'])}) · "
        f"nnz {summary['nnz']:,} of target {summary['nnz_target']:,} · "
        f"{summary['train_flops'] / max(1, summary['train_flops_dense_equivalent']):.3f} of dense FLOPs · "
        f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s"
    )
