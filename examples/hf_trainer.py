"""A GPT-2 that the Hugging Face Trainer trains sparse from the first step: `python examples/hf_trainer.py`.

One callback is all that the Trainer needs: `attach` hangs the Sparsifier on the optimizer's own step. Wants
`pip install accelerate`, as every Trainer does.
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparsae import AdamW, Sparsifier, SparsifierConfig, densify, parameter_groups, sparsify

STEPS = 60


class Counting(Dataset):
    """Sequences that count up from a random number."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index * 37) % 64
        return {"input_ids": tokens, "labels": tokens}


class Sparse(TrainerCallback):
    """Moves connections in the optimizer's step, and prints what each update did."""

    sparsifier: Sparsifier

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model, optimizer, **_
    ) -> None:
        config = SparsifierConfig(steps=state.max_steps)
        self.sparsifier = Sparsifier(model, optimizer, config).attach(
            on_update=lambda update: print(f"{update.row['swaps']} connections replaced")
        )

    def on_train_end(self, *_: object, **__: object) -> None:
        self.sparsifier.close()


def main() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    sparsify(model, sparsity=0.9)
    # The optimizer is made of the sparse parameters: moments exist for connections only.
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            max_steps=STEPS,
            per_device_train_batch_size=32,
            save_strategy="no",  # a checkpoint of the Trainer's knows nothing of the Sparsifier
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        callback = Sparse()
        trainer = Trainer(
            model, arguments, train_dataset=Counting(), optimizers=(optimizer, None), callbacks=[callback]
        )
        loss = trainer.train().training_loss
        print(f"{callback.sparsifier.nnz:,} connections, mean loss {loss:.3f}")

        dense = densify(model).eval()  # zeros where there is no connection: whatever knows transformers loads it
        dense.save_pretrained(Path(out) / "model")
        loaded = AutoModelForCausalLM.from_pretrained(Path(out) / "model")
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            print("counts on with", loaded(tokens).logits[0, -1].argmax().item())
            assert torch.allclose(loaded(tokens).logits, dense(tokens).logits, atol=1e-5)


if __name__ == "__main__":
    main()
