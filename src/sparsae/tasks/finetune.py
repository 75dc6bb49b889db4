"""One fine-tuning: a run's model on one task with one seed, by the Hugging Face Trainer."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsae.config.rules import default_rule
from sparsae.config.schema import Config
from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.models import quiet_import
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify
from sparsae.optim import AdamW, parameter_groups
from sparsae.rules import build_rule
from sparsae.tasks.classifier import ChoiceModel, classifier, predict
from sparsae.tasks.data import TaskData
from sparsae.tasks.encoding import Collator, Encoded, encode
from sparsae.tasks.metrics import EXTRA, all_scores
from sparsae.tasks.record import Outcome
from sparsae.tasks.settings import FinetuneConfig, TopologyMode
from sparsae.train.model import choose_device, head_layouts

if TYPE_CHECKING:
    from transformers import Trainer

_WARM_UP = 0.05  # of the steps

StepDone = Callable[[], None]


class DivergedError(InputError):
    """A fine-tuning whose loss is no number any more."""


def step_count(settings: FinetuneConfig, samples: int) -> int:
    """Optimizer steps of one fine-tuning on so many samples."""
    return settings.epochs * math.ceil(samples / settings.batch_size)


def refuse_without_libraries() -> None:
    """Raise InputError where what the Trainer needs is not installed."""
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise InputError(f"fine-tuning needs accelerate: {EXTRA}")


def finetune(
    run: Path,
    data: TaskData,
    mode: TopologyMode,
    seed: int,
    settings: FinetuneConfig,
    step_done: StepDone,
    best: bool = False,
) -> Outcome:
    """Fine-tune the run's model, its topology in the given mode, and score it on the task's validation examples.

    step_done: called after every optimizer step. best: begin with the run's best checkpoint, not its newest. Raises
    InputError for a run that cannot be read, DivergedError where training diverges.
    """
    loaded = load_run(run, best=best)
    device = loaded.device if settings.device is None else choose_device(settings.device, "--device")
    length = settings.max_length or loaded.config.model.context
    sets = {"train": data.train, **data.validations}
    encoded, shortened = dict[str, list[Encoded]](), 0
    for name, examples in sets.items():
        encoded[name], count = encode(examples, loaded.tokenizer, length)
        shortened += count
    train = encoded.pop("train")
    model = classifier(loaded, data.task, seed)
    if mode == "dense":
        model = densify(model)
    model.to(device)
    collator = Collator(loaded.tokenizer.pad_id, data.task.chooses)

    bfloat16 = (settings.precision or loaded.config.training.precision) == "bfloat16"

    def score() -> dict[str, float]:
        return all_scores(data, {name: predict(model, part, collator, 64, bfloat16) for name, part in encoded.items()})

    swaps = list[int]()
    rule = _search(loaded.config, model) if mode == "searched" else None
    began = time.monotonic()
    epochs = list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, train, collator, seed, settings, device, scratch, bfloat16)
        from sparsae.integrations.transformers import SparsaeCallback
        from sparsae.tasks.callbacks import Following

        trainer.add_callback(Following(step_done, lambda: epochs.append(score())))
        if rule is not None:
            trainer.add_callback(
                SparsaeCallback(seed=seed, on_update=lambda update: swaps.append(update.record.swaps), **rule)
            )
        loss = float(trainer.train().training_loss)
    if not math.isfinite(loss):
        raise DivergedError(
            f"task {data.task.name}: training diverged: lower --learning-rate {settings.learning_rate:g}"
        )
    return Outcome(
        scores=epochs[-1],
        epochs=tuple(epochs),
        training_loss=loss,
        nnz=sum(layer.topology.nnz for layer in sparse_layers(model).values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        shortened=shortened,
        rule=rule["topology"].rule if rule else None,
        swaps=sum(swaps),
        seconds=time.monotonic() - began,
    )


def _trainer(
    model: nn.Module,
    train: Sequence[Encoded],
    collator: Collator,
    seed: int,
    settings: FinetuneConfig,
    device: torch.device,
    scratch: str,
    bfloat16: bool,
) -> Trainer:
    with quiet_import():
        from transformers import PrinterCallback, Trainer, TrainingArguments
    steps = step_count(settings, len(train))
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=math.ceil(_WARM_UP * steps),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=bfloat16,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would put the mean of the losses before in the place of one that is none
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several, the Trainer would copy the model to each
    optimizer = AdamW(parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=list(train), optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _search(config: Config, model: nn.Module) -> dict[str, Any]:
    """The run's own rule within the run's own bounds, where it moves connections without pruning or scores.

    Else the default rule within them. Layers of a model that chooses have a name before their own.
    """
    prefix = "model." if isinstance(model, ChoiceModel) else ""
    names, sparsity = [name.removeprefix(prefix) for name in sparse_layers(model)], config.sparsity
    low, high = sparsity.density_bounds
    bounds = {
        "min_density": low,
        "max_density": high,
        "head_min_density": sparsity.head_min_density,
        "fan_in": sparsity.fan_in,
        "fan_out": sparsity.fan_out,
        "heads": {prefix + name: layout for name, layout in head_layouts(names, config).items()},
    }
    # A head that was sparse is there no more, and so may be the rule of its own, or that of all others.
    own = {p: each for p, each in config.rules.items() if any(fnmatchcase(name, p) for name in names)}
    is_base = any(not any(fnmatchcase(name, p) for p in own) for name in names)
    topology = config.topology if is_base else own.pop(list(own)[-1])
    rule = build_rule(topology, own)
    if not rule.moves or rule.prunes or rule.terms:
        return {"topology": default_rule(), **bounds}
    return {"topology": topology, "rules": {prefix + p: each for p, each in own.items()}, **bounds}
