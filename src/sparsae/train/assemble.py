"""The objects of a run, put together: what `run` and the benchmarks train with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.schema import Config
from sparsae.data.batches import Batches
from sparsae.distill import Teacher
from sparsae.models import parameterized
from sparsae.nn.linear import sparse_layers
from sparsae.optim import AdamW, parameter_groups
from sparsae.rules import build_rule
from sparsae.train.build import head_layouts
from sparsae.train.costs import RunCosts
from sparsae.train.loop import Trainer
from sparsae.train.manifest import Extension
from sparsae.train.micro_batch import MicroBatches
from sparsae.train.objective import HeldOutScore, HeldOutStudy, Objective
from sparsae.train.progress import Display
from sparsae.train.rundir import MetricsWriter
from sparsae.train.sparsifier import Sparsifier, SparsifierConfig
from sparsae.train.stopwatch import Stopwatch
from sparsae.train.trackers import Trackers


def epoch_steps(config: Config, batches: Batches) -> int:
    """Optimizer steps of a pass over the training text."""
    return max(1, round(batches.windows / (config.training.batch_size * config.training.accumulation)))


def optimizer_of(model: nn.Module, config: Config) -> AdamW:
    """AdamW over the parameters of a model whose layers have the densities that they start with."""
    settings = config.training
    groups = parameter_groups(
        model,
        settings.weight_decay,
        parameterized(config.model, config.parameterization),
        lr=settings.learning_rate,
        eps=settings.epsilon,
    )
    return AdamW(groups, betas=(settings.beta1, settings.beta2))


def trainer_of(
    config: Config,
    model: nn.Module,
    optimizer: AdamW,
    batches: Batches,
    validation: Tensor,
    micro_tokens: Any,
    metrics: MetricsWriter,
    trackers: Trackers,
    display: Display,
    device: torch.device,
    extension: Extension | None = None,
) -> Trainer:
    """The loop with the Sparsifier and the teacher that the configuration wants.

    micro_tokens: the held-out tokens that score candidates. extension: the last one, of a run that got more steps.
    """
    rule = build_rule(config.topology, config.rules)
    teacher = Teacher(model, config.teacher) if config.teacher.enabled else None
    seed = config.seed if config.model.dropout else None
    objective = Objective(model, config.training, device, teacher=teacher, dropout_seed=seed)
    sparsifier: Sparsifier | None = None
    micro: MicroBatches | None = None
    watch = Stopwatch()
    if sparse_layers(model):
        if rule.micro_batch:
            micro = MicroBatches(micro_tokens, config.model.context, rule.micro_batch, config.seed, device)
        sparsifier = Sparsifier(
            model,
            optimizer,
            SparsifierConfig(
                steps=config.training.steps,
                topology=config.topology,
                rules=config.rules,
                teacher=config.teacher,
                accumulation=config.training.accumulation,
                steps_per_epoch=epoch_steps(config, batches),
                seed=config.seed,
                min_density=config.sparsity.density_bounds[0],
                max_density=config.sparsity.density_bounds[1],
                head_min_density=config.sparsity.head_min_density,
                sparsity=config.sparsity.sparsity if rule.prunes else None,
                budget=config.sparsity.budget,
            ),
            score=HeldOutScore(objective, micro) if micro else None,
            study=HeldOutStudy(objective, validation, watch) if rule.micro_batch and rule.micro_batch.study else None,
            heads=head_layouts(sparse_layers(model), config),
            parameterization=parameterized(config.model, config.parameterization),
            teacher=teacher,
        )
    return Trainer(
        config,
        objective,
        optimizer,
        sparsifier,
        batches,
        validation,
        micro,
        RunCosts(model, config, rule.micro_batch),
        watch,
        metrics,
        trackers,
        display,
        extension,
    )


def silent_trainer(
    config: Config, model: nn.Module, batches: Batches, validation: Tensor, micro_tokens: Any, device: torch.device
) -> Trainer:
    """The loop for measurements, with a new optimizer: its metrics go nowhere and it shows nothing."""
    nowhere = Path(os.devnull)
    return trainer_of(
        config,
        model,
        optimizer_of(model, config),
        batches,
        validation,
        micro_tokens,
        MetricsWriter(nowhere),
        Trackers(config.tracking, nowhere, {}),
        Display(quiet=True),
        device,
    )
