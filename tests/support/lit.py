"""A small LightningModule, data for it, and a trainer around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler, TensorDataset

from sparsae import AdamW, parameter_groups, sparsify
from sparsae.integrations.lightning import SparsaeCallback


def points(count: int = 64, seed: int = 0) -> TensorDataset:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.argmax(1))


def loss_on(net: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


class Classifier(LightningModule):
    """Which of its inputs is the largest."""

    def __init__(self, sparsity: float = 0.8, listens: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        if sparsity is not None:
            sparsify(self.net, sparsity, exclude=["4"], seed=1)
        self.listens = listens

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, label = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, label)
        self.log("loss", loss)
        return loss + SparsaeCallback.of(self.trainer).distillation(logits, x) if self.listens else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", loss_on(self.net, batch))

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(parameter_groups(self, weight_decay=0.1), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)]


def fit(
    folder: Path,
    callback: SparsaeCallback | None,
    module: LightningModule,
    *,
    ckpt_path: Path | None = None,
    data: TensorDataset | None = None,
    validation: TensorDataset | None = None,
    callbacks: tuple[Any, ...] = (),
    batch_size: int = 8,
    monitor: str | None = None,
    sampler: type[Sampler[int]] = SequentialSampler,
    **arguments: Any,
) -> Trainer:
    """Train it for four epochs of eight batches, with a checkpoint after each; data in the order of its rows."""
    kept = ModelCheckpoint(
        folder, filename="{epoch}", save_top_k=-1, monitor=monitor, mode="max", save_on_train_epoch_end=True
    )
    given = {"max_epochs": 4, "log_every_n_steps": 2, "accelerator": "cpu", "logger": False}
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[kept, *([] if callback is None else [callback]), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **given | arguments,
    )
    loaders = [
        DataLoader(each, batch_size=batch_size, sampler=sampler(each))
        for each in (data or points(), validation)
        if each is not None
    ]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer
