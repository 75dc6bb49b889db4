"""A small GPT-2 and a small Llama, sequences for it, and the Trainer of transformers around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparsae import AdamW, parameter_groups, sparsify
from sparsae.integrations.transformers import SparsaeCallback, SparsaeTrainer
from tests.support.architectures import ARCHITECTURES

SIZES = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 12, "vocab_size": 32}


class Counting(Dataset):
    """Sequences that count up from a number; the first of each are not learned, of some more than of others."""

    def __init__(self, count: int = 96, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) + (index + self.first) * 37) % 32
        labels = tokens.clone()
        labels[: index % 4] = -100
        return {"input_ids": tokens, "labels": labels}


def gpt2(sparsity: float = 0.8, dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **drop, bos_token_id=0, eos_token_id=0))
    return sparsify(model, sparsity=sparsity, seed=3)


def sparse_llama(tied: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**(ARCHITECTURES["Llama"].settings | settings), tie_word_embeddings=tied)
    return sparsify(LlamaForCausalLM(config), 0.7).eval()


def trainer(
    folder: Path,
    callback: SparsaeCallback | None,
    *,
    model: GPT2LMHeadModel | None = None,
    kind: type[Trainer] = SparsaeTrainer,
    callbacks: tuple[Any, ...] = (),
    eval_dataset: Any = None,
    train_dataset: Any = None,
    **arguments: Any,
) -> Trainer:
    model = gpt2() if model is None else model
    given = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 6,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(
        model,
        TrainingArguments(output_dir=str(folder), **given | arguments),
        train_dataset=Counting() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        optimizers=(AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2), None),
        callbacks=[*callbacks, *([] if callback is None else [callback])],
    )
