"""Sparse training in the Trainer of transformers: a callback that searches the topology, and a Trainer for the rest.

    sparsify(model, sparsity=0.9)
    trainer = SparsaeTrainer(model, arguments, train_dataset=data, callbacks=[SparsaeCallback()])
    trainer.train()

The callback serves any Trainer. What a callback cannot do, `SparsaeMixin` adds before the class of another Trainer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.data.data_collator import default_data_collator
from transformers.loss.loss_utils import ForCausalLMLoss

from sparsae.errors import InputError
from sparsae.integrations import checkpoint
from sparsae.integrations.companion import Circumstances, CompanionCallback, LossFunction, logits_of, refuse_dense
from sparsae.integrations.held_out import Collate
from sparsae.nn.linear import sparse_layers
from sparsae.optimizer_state import parts_of

log = logging.getLogger(__name__)

_TEACH = "use SparsaeTrainer (or SparsaeMixin before your Trainer's class), or add the callback's distillation(...)"


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            "held_out: the model returns no loss for a batch of it: give samples with labels, or a function as "
            "SparsaeCallback(loss=...)"
        )
    return loss


class SparsaeCallback(CompanionCallback, TrainerCallback):
    """Searches the topology of a sparsified model, in steps that the optimizer makes, and keeps its teacher.

    It writes its state into the folder `sparsae` of every checkpoint, and continues from there; at the end,
    `topology.html` lies in `output_dir`. Updates count the steps that were made: one that a gradient scaler skips is
    none. Gradients of values are clipped by then (`max_grad_norm`), those at inactive connections are not.
    """

    def __init__(
        self,
        *,
        collate: Collate = default_data_collator,
        loss: LossFunction | None = None,
        monitor: str = "eval_loss",
        **search: Any,
    ) -> None:
        """Arguments as `CompanionCallback` has them. loss: None: what the model itself returns as `loss`.

        monitor: the metric of an evaluation that ends the teacher's warm-up, if validation does.
        """
        super().__init__(collate=collate, loss=_loss_of if loss is None else loss, **search)
        self.resumed: Path | None = None
        self._monitor, self._evaluated = monitor, set[str]()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any) -> None:
        """Raises InputError for a dense model, and for what cannot train one whose connections move."""
        for name, value in (("deepspeed", args.deepspeed), ("fsdp", args.fsdp)):
            if value:
                raise InputError(
                    f"SparsaeCallback: {name} splits parameters, whose connections could not move: leave it out"
                )
        if args.n_gpu > 1:
            raise InputError(
                "SparsaeCallback: DataParallel over several GPUs is not supported: start one process (CUDA_VISIBLE_"
                "DEVICES=0), or one for each by torchrun"
            )
        refuse_dense(around["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        """With model and optimizer as they are now, loaded from a checkpoint or not."""
        from accelerate.utils import send_to_device  # which every Trainer wants

        model, optimizer, loader = around["model"], around["optimizer"], around["train_dataloader"]
        passes = args.gradient_accumulation_steps
        batches = len(loader) if hasattr(loader, "__len__") else None
        self._companion.begin(
            model,
            optimizer,
            Circumstances(
                steps=state.max_steps,
                passes=passes,
                is_even=batches is not None and batches % passes == 0,
                steps_per_epoch=None if batches is None else math.ceil(batches / passes),
                scaler=getattr(optimizer, "scaler", None),
                move=lambda batch: send_to_device(batch, args.device),
            ),
        )
        self._model, self._evaluated = model, set[str]()
        if state.global_step:
            folder = self.resumed or _checkpoint(args, state.global_step)
            if self.resumed is None and not folder.is_dir():
                raise InputError(
                    f"{folder}: not there, and a callback is not told of another place: resume from a checkpoint in "
                    "output_dir, or with SparsaeTrainer"
                )
            checkpoint.load(self._companion, model, folder)
        if args.eval_strategy == "no":
            self._companion.warn_of(self._monitor, "nothing is evaluated (eval_strategy)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises InputError for a teacher that nobody listens to."""
        self._companion.stepped(_TEACH)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any) -> None:
        """The validation loss may end the teacher's warm-up; one that no evaluation has is told, once."""
        metrics = around.get("metrics") or {}
        if not self._companion.records:
            return
        loss, own = metrics.get(self._monitor), {name for name in metrics if name.startswith("eval_")}
        again = bool(own) and own <= self._evaluated
        self._evaluated |= own
        if again and loss is None and self._monitor not in self._evaluated:
            there = ", ".join(sorted(self._evaluated))
            self._companion.warn_of(self._monitor, f"no evaluation has it (there are: {there})")
        self._companion.validated(None if loss is None else float(loss))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the topology's metrics to the row, where the Trainer has not: it is later than loggers are."""
        if logs is not None and "loss" in logs and "sparsae/nnz" not in logs:
            logs |= self.metrics()
            state.log_history[-1] |= logs

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Beside what the Trainer has saved."""
        if not args.should_save or args.save_only_model:
            return
        if state.is_hyper_param_search:
            log.warning("checkpoints of a hyperparameter search have no state of the Sparsifier: train on from none")
            return
        checkpoint.save(self._companion, self._model, _checkpoint(args, state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        """The page of the topology; and the state that belongs to the best model, where the Trainer has loaded it."""
        if args.should_save:
            self._companion.write_page(Path(str(args.output_dir)), f"Topology of {type(self._model).__name__}")
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not args.save_only_model:
            records = self._companion.records
            checkpoint.load(self._companion, self._model, Path(best))
            self._companion.records = records
            # Which the Trainer has not loaded: it is that of the last connections.
            for part in parts_of(around["optimizer"]):
                for layer in sparse_layers(self._model).values():
                    part.state.pop(layer.values, None)
        self._companion.end()


class SparsaeMixin:
    """Before the class of a Trainer: `class Mine(SparsaeMixin, Seq2SeqTrainer)`. It finds the callback by itself.

    The teacher has its part in the loss, the topology's metrics go to every logger (TensorBoard, wandb, ...), and a
    checkpoint may lie anywhere.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        is_path = not isinstance(resume_from_checkpoint, bool) and resume_from_checkpoint is not None
        if callback := _callback_of(self):
            callback.resumed = Path(str(resume_from_checkpoint)) if is_path else None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's loss, and what the teacher adds in training."""
        given, callback = dict(inputs), _callback_of(self)
        kwargs = {"num_items_in_batch": num_items_in_batch}
        if callback is None or not model.training or callback.sparsifier.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)  # type: ignore[misc]
        loss = loss + self._taught(callback, given, logits_of(outputs), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _taught(self, callback: SparsaeCallback, inputs: dict[str, Any], logits: Tensor, items: Any) -> Tensor:
        trainer: Any = self
        inner = trainer.accelerator.unwrap_model(trainer.model)
        labels, is_seq2seq = inputs.get("labels"), bool(getattr(inner.config, "is_encoder_decoder", False))
        counted = None
        if labels is not None and labels.shape == logits.shape[:-1]:
            counted = labels != -100
            if getattr(inner, "loss_function", None) is ForCausalLMLoss and not is_seq2seq:
                # A position predicts the label of the next one.
                counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
        # A loss that the Trainer does not divide by the passes is a sum over the items of all of them.
        is_sum = items is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)
        shown = {name: value for name, value in inputs.items() if name != "labels" or is_seq2seq}
        found = callback.distillation(logits, counted=counted, total=items if is_sum else None, **shown)
        return (
            found * trainer.accelerator.num_processes
            if is_sum and trainer.args.average_tokens_across_devices
            else found
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's row of a training step, with the topology's metrics."""
        callback = _callback_of(self)
        super().log(logs | callback.metrics() if callback and "loss" in logs else logs, *args, **kwargs)  # type: ignore[misc]


class SparsaeTrainer(SparsaeMixin, Trainer):
    """The Trainer of transformers for a sparse model with a SparsaeCallback."""


def _callback_of(trainer: Any) -> SparsaeCallback | None:
    return next((each for each in trainer.callback_handler.callbacks if isinstance(each, SparsaeCallback)), None)


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"
