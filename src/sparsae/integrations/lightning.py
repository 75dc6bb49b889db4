"""Sparse training in Lightning: a callback that searches the topology.

    trainer = Trainer(max_steps=10_000, callbacks=[SparsaeCallback()])
    trainer.fit(module, data)           # a module whose __init__ has called sparsify

A callback cannot change a loss: `training_step` adds what the teacher has to say, `SparsaeCallback.of(self.trainer)`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn
from torch.utils.data import default_collate

from sparsae.core.ranks import ranks
from sparsae.errors import InputError
from sparsae.integrations.companion import Circumstances, CompanionCallback, refuse_dense
from sparsae.integrations.held_out import Collate
from sparsae.nn.linear import sparse_layers

# Strategies that split parameters.
_SPLITTING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")
# Those that average parameters; the second, and EMAWeightAveraging with it, is not in every version.
_AVERAGING = tuple(
    getattr(lightning_callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(lightning_callbacks, name)
)


class SparsaeCallback(CompanionCallback, Callback):  # type: ignore[misc, unused-ignore]  # where Lightning is not installed
    """Searches the topology of a sparsified module, in steps that the optimizer makes, and keeps its teacher.

    Its state is in every checkpoint, among those of callbacks. At the end, `topology.html` lies in the logger's folder,
    or in `default_root_dir`. Updates count the steps that were made: one that a gradient scaler skips is none.
    Gradients of values are clipped by then (`gradient_clip_val`), those at inactive connections are not.
    """

    def __init__(
        self, *, module: str = "", monitor: str = "val_loss", collate: Collate = default_collate, **search: Any
    ) -> None:
        """collate, search: as `CompanionCallback` has them.

        module: the part of the LightningModule that is sparse, and averaged by the teacher; "": all of it. monitor: the
        logged metric that ends the teacher's warm-up, if validation does.
        """
        super().__init__(collate=collate, **search)
        self._part, self._monitor = module, monitor
        self._loaded: dict[str, Any] | None = None
        self._missed = 0

    @classmethod
    def of(cls, trainer: Trainer) -> SparsaeCallback:
        """The callback of a trainer. Raises InputError where it has none."""
        found = next((each for each in _callbacks(trainer) if isinstance(each, cls)), None)
        if found is None:
            raise InputError("the trainer has no SparsaeCallback: give Trainer(callbacks=[SparsaeCallback(...)])")
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises InputError for a dense module, and for what cannot train one whose connections move."""
        if stage != "fit":
            return
        if (strategy := type(trainer.strategy).__name__) in _SPLITTING:
            raise InputError(
                f"SparsaeCallback: {strategy} splits parameters, whose connections could not move: use one device"
            )
        averaging = next((each for each in _callbacks(trainer) if isinstance(each, _AVERAGING)), None)
        if self._companion.moves and averaging is not None:
            raise InputError(
                f"SparsaeCallback: {type(averaging).__name__} averages values by their place, and connections move: "
                "give SparsaeCallback a teacher, whose average follows them, or leave the topology static"
            )
        refuse_dense(self._sparse(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With module and optimizer as they are now, loaded from a checkpoint or not."""
        model, passes, batches = self._sparse(pl_module), trainer.accumulate_grad_batches, trainer.num_training_batches
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            raise InputError("SparsaeCallback: a training without an end has no schedule: give Trainer max_steps")
        is_known = math.isfinite(batches)
        self._companion.begin(
            model,
            _optimizer_of(trainer, model),
            Circumstances(
                steps=int(steps),
                passes=passes,
                is_even=is_known and batches % passes == 0,
                steps_per_epoch=math.ceil(batches / passes) if is_known else None,
                scaler=getattr(trainer.precision_plugin, "scaler", None),
                move=lambda batch: trainer.strategy.batch_to_device(batch),
                precision=trainer.precision_plugin.forward_context,
            ),
        )
        self._missed = 0
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._companion.load_state_dict(loaded)
        elif trainer.global_step and trainer.ckpt_path is None:
            raise InputError(
                f"SparsaeCallback: this Trainer has made {trainer.global_step} steps, and its schedules with it: go "
                "on by fit(..., ckpt_path=...), with more steps where all are made, or begin with a new Trainer"
            )
        elif trainer.global_step:
            raise InputError(
                f"{trainer.ckpt_path} was written without SparsaeCallback: begin a new training with its weights"
            )
        if not trainer.enable_validation:
            self._companion.warn_of(self._monitor, "nothing is validated")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where the topology is. Raises InputError for a teacher that nobody listens to."""
        self._companion.stepped(
            "let training_step add SparsaeCallback.of(self.trainer).distillation(logits, inputs) to it"
        )
        if trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._companion.metrics(), on_step=True, on_epoch=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation loss may end the teacher's warm-up."""
        loss = trainer.callback_metrics.get(self._monitor)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._companion.waits_for_validation and not any(ranks().gather(loss is not None, "metrics")):
            # A metric of whole epochs is there from the second validation on.
            self._missed += 1
            if self._missed > 1:
                named = ", ".join(sorted(trainer.callback_metrics)) or "none"
                self._companion.warn_of(self._monitor, f"no validation has it (there are: {named})")
        self._companion.validated(None if loss is None else float(loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The page of the topology."""
        self._companion.end()
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # of which the first rank tells the others
        if trainer.is_global_zero:
            self._companion.write_page(folder, f"Topology of {type(pl_module).__name__}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._companion.end()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; nothing before training begins."""
        return self._companion.state_dict() if self._companion.records else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until module and optimizer are loaded too."""
        self._loaded = state_dict or None

    def _sparse(self, module: LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self._part)
        except AttributeError:
            raise InputError(f"SparsaeCallback: {type(module).__name__} has no module '{self._part}'") from None


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined, unused-ignore]
    return found


def _optimizer_of(trainer: Trainer, model: nn.Module) -> torch.optim.Optimizer:
    """The one that has the sparse values. Raises InputError where they are not in one."""
    values = {id(layer.values) for layer in sparse_layers(model).values() if layer.values.requires_grad}
    found = []
    for optimizer in trainer.optimizers:
        if values & {id(p) for group in optimizer.param_groups for p in group["params"]}:
            found.append(optimizer)
    if len(found) != 1:
        raise InputError(
            f"SparsaeCallback: {len(found)} optimizers have values of sparse layers: give all of them to one, or use "
            "module= to name the part that is searched"
        )
    return found[0]
