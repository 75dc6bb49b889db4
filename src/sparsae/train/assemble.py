"""The objects of a run, put together: what `run` and the benchmarks train with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sparsae.config.schema import Config
from sparsae.config.sparsifier import TOLD, SparsifierConfig
from sparsae.data.batches import Batches
from sparsae.models import dropouts, parameterized
from sparsae.nn.linear import sparse_layers
from sparsae.observers import Observer
from sparsae.optim import AdamW, parameter_groups
from sparsae.rules import build_rule
from sparsae.runs.manifest import Extension
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.teacher import Teacher
from sparsae.train.account import Account
from sparsae.train.costs import RunCosts
from sparsae.train.data import TrainData
from sparsae.train.learning_rate import LearningRate
from sparsae.train.loop import Trainer
from sparsae.train.model import density_of, head_layouts
from sparsae.train.objective import HeldOutScore, HeldOutStudy, Objective
from sparsae.train.peak import peak_flops


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
        sparse_factor=(settings.sparse_learning_rate or settings.learning_rate) / settings.learning_rate,
        eps=settings.epsilon,
    )
    return AdamW(groups, betas=(settings.beta1, settings.beta2))


def trainer_of(
    config: Config,
    model: nn.Module,
    optimizer: AdamW,
    data: TrainData,
    device: torch.device,
    observers: Sequence[Observer] = (),
    extension: Extension | None = None,
) -> Trainer:
    """The loop with the Sparsifier and the teacher that the configuration wants.

    extension: the last one, of a run that got more steps.
    """
    training = config.training
    teacher = Teacher(model, config.teacher, training.steps) if config.teacher.enabled else None
    objective = Objective(
        model, training, device, teacher=teacher, dropout_seed=config.seed if dropouts(config.model) else None
    )
    account = Account(
        RunCosts(model, config, build_rule(config.topology, config.rules).micro_batch),
        tokens_per_step=config.tokens_per_step,
        study_tokens=data.validation[:, 1:].numel(),
        peak_flops=peak_flops(training, device),
    )
    return Trainer(
        training,
        objective,
        optimizer,
        data,
        sparsifier=sparsifier_of(config, objective, optimizer, data, account) if sparse_layers(model) else None,
        rate=LearningRate(training, extension),
        account=account,
        observers=observers,
    )


def sparsifier_of(
    config: Config, objective: Objective, optimizer: AdamW, data: TrainData, account: Account
) -> Sparsifier:
    """The search over the sparse layers of the objective's model; a study's time is booked on the account."""
    rule, sparsity = build_rule(config.topology, config.rules), config.sparsity
    moves = rule.prunes or sparsity.schedule.moves
    studies = rule.micro_batch is not None and rule.micro_batch.study
    return Sparsifier(
        objective.model,
        optimizer,
        SparsifierConfig.model_validate(
            {
                "steps": config.training.steps,
                "topology": config.topology,
                "rules": config.rules,
                "accumulation": config.training.accumulation,
                "steps_per_epoch": epoch_steps(config, data.batches),
                "seed": config.seed,
                "min_density": sparsity.density_bounds[0],
                "max_density": sparsity.density_bounds[1],
                "head_min_density": sparsity.head_min_density,
                "fan_in": sparsity.fan_in,
                "fan_out": sparsity.fan_out,
                "sparsity": sparsity.sparsity if moves else None,
                "schedule": sparsity.schedule,
                "budget": sparsity.budget,
                "density": density_of(config) if moves else {},
            },
            context=TOLD,
        ),
        score=HeldOutScore(objective, data.micro_batches) if data.micro_batches else None,
        study=HeldOutStudy(objective, data.validation, account.watch) if studies else None,
        heads=head_layouts(sparse_layers(objective.model), config),
        parameterization=parameterized(config.model, config.parameterization),
        teacher=objective.teacher,
    )
