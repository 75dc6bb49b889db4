"""The outcome of a run in numbers, and in a line."""

from __future__ import annotations

import torch
from torch import nn

from sparsae.config.schema import Config
from sparsae.core.accounting import dense_state_bytes
from sparsae.core.ranks import ranks
from sparsae.errors import DivergedError
from sparsae.nn.linear import sparse_layers
from sparsae.runs.directory import RunDirectory
from sparsae.runs.manifest import Manifest
from sparsae.runs.metrics import Position
from sparsae.runs.rows import perplexity
from sparsae.runs.summary import Divergence, Origin, Summary
from sparsae.train.loop import Trainer
from sparsae.train.memory import peak_bytes
from sparsae.train.progress import readable_perplexity


def summarize(
    manifest: Manifest,
    trainer: Trainer,
    unigram: float,
    seconds: float,
    metrics: Position | None,
    diverged: DivergedError | None,
) -> Summary:
    """What came out by now."""
    config, model, account, validation = manifest.config, trainer.model, trainer.account, trainer.validation
    tokens = account.tokens(trainer.step)
    live = sum(p.numel() for p in model.parameters())
    nnz = sum(layer.topology.nnz for layer in sparse_layers(model).values())
    weights = account.costs.cost.sparse_weights
    b_out, b_in = config.sparsity.block
    target = b_out * b_in * round((1.0 - config.sparsity.sparsity) * (weights // (b_out * b_in)))
    training_seconds = sum(account.watch.seconds.get(part, 0.0) for part in ("train", "topology"))
    flops_per_second = account.flops.total / training_seconds if training_seconds else None
    return Summary(
        preset=config.preset,
        method=config.method,
        seed=config.seed,
        steps=trainer.step,
        ranks=ranks().count,
        steps_skipped=account.skipped,
        tokens=tokens,
        parameters_dense=live - nnz + weights,
        parameters=live,
        sparsity=1.0 - account.costs.density,
        nnz=nnz,
        nnz_target=target,
        validation_loss=validation.loss,
        validation_perplexity=perplexity(validation.loss),
        test_loss=validation.test_loss,
        teacher_validation_loss=validation.teacher_loss,
        unigram_perplexity=unigram,
        untrained_perplexity=perplexity(validation.untrained),
        train_flops=account.flops.total,
        train_flops_by_part=dict(account.flops.parts),
        train_flops_dense_equivalent=account.flops.dense_equivalent,
        study_flops=account.flops.study,
        state_bytes_sparse_layers=sum(account.state_bytes.values()),
        state_bytes_by_part=dict(account.state_bytes),
        state_bytes_sparse_layers_dense_equivalent=dense_state_bytes(weights, teacher=config.teacher.enabled),
        telemetry_bytes=trainer.sparsifier.search.telemetry.nbytes() if trainer.sparsifier else 0,
        peak_memory_bytes=peak_bytes(trainer.objective.device),
        tokens_per_second=tokens / training_seconds if training_seconds else None,
        flops_per_second=flops_per_second,
        mfu=account.utilization(flops_per_second),
        topology_updates=account.updates,
        topology_updates_accepted=account.accepted,
        seconds=seconds,
        seconds_by_part=dict(account.watch.seconds),
        finished=diverged is None and trainer.done,
        diverged=Divergence(step=diverged.step, reason=diverged.reason) if diverged else None,
        started_from=Origin(**manifest.started_from) if manifest.started_from else None,
        extensions=manifest.extensions,
        changes=manifest.changes,
        metrics=metrics,
        device=str(trainer.objective.device),
        torch=torch.__version__,
    )


def headline(config: Config, model: nn.Module, training_tokens: int, unigram: float) -> str:
    """What is about to be trained."""
    layers = sparse_layers(model)
    nnz = sum(layer.topology.nnz for layer in layers.values())
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{config.preset} · {config.method} · "
        f"{total:,} parameters exist, {nnz:,} of them in {len(layers)} sparse layers · "
        f"{training_tokens:,} training tokens · a unigram model's perplexity: {readable_perplexity(unigram)}"
    )


def closing(summary: Summary, run: RunDirectory) -> str:
    """What came out, or how to continue."""
    if not summary.finished:
        saved = "stopped and saved" if summary.steps else "stopped"
        return f"{saved} at step {summary.steps}; continue with: sparsae train --resume {run.path}"
    tested = "" if summary.test_loss is None else f"test {readable_perplexity(perplexity(summary.test_loss))}, "
    nnz = f"nnz {summary.nnz:,} of target {summary.nnz_target:,} · " if summary.nnz_target else ""
    if summary.nnz != summary.nnz_target:
        nnz = f"{nnz}its rule did not bring it there · "
    return (
        f"validation perplexity {readable_perplexity(summary.validation_perplexity)} "
        f"({tested}unigram {readable_perplexity(summary.unigram_perplexity)}, "
        f"at the start {readable_perplexity(summary.untrained_perplexity)}) · "
        f"{nnz}"
        f"{summary.train_flops / max(1, summary.train_flops_dense_equivalent):.3f} of dense FLOPs · "
        f"{summary.tokens:,} tokens in {summary.seconds:.0f} s"
    )
