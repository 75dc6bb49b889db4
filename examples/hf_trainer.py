# %% [markdown]
"""# The Trainer of transformers

A GPT-2 that the Trainer of transformers trains sparse from the first step: `python examples/hf_trainer.py`.

`sparsify` comes before the Trainer, and one callback into it. SparsaeTrainer, a Trainer, lets the teacher have its part
in the loss. Stopped at half and resumed, training ends as if it had not been stopped, bit for bit. Wants
`pip install accelerate`, as every Trainer does; docs/trainers.md tells the rest.
"""

# %%
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from sparsae import AdamW, parameter_groups, sparsify
from sparsae.config import TeacherConfig
from sparsae.integrations.transformers import SparsaeCallback, SparsaeTrainer

STEPS = 60

# %% [markdown]
# Something to learn: the next number.


# %%
class Counting(Dataset):
    """Sequences that count up from a random number."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index * 37) % 64
        return {"input_ids": tokens, "labels": tokens}


# %% [markdown]
# The model is made sparse before the Trainer gets it; the callback does the rest.


# %%
def training(folder: str) -> SparsaeTrainer:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    sparsify(model, sparsity=0.9)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=32,
        save_steps=STEPS // 2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = SparsaeCallback(
        teacher=TeacherConfig(beta=0.9, alpha=0.1),
        on_update=lambda update: print(f"{update.row['swaps']} connections replaced"),
    )
    # Without `optimizers` the Trainer makes its own. This one also counts steps for each weight.
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
    return SparsaeTrainer(
        model, arguments, train_dataset=Counting(), optimizers=(optimizer, None), callbacks=[callback]
    )


# %% [markdown]
# One training without a stop, one from its checkpoint, and their weights beside each other; then the losses, and how
# many connections had been replaced.


# %%
def main() -> SparsaeTrainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = training(folder)
        trainer.train()
        resumed = training(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    model, again = trainer.model.eval(), resumed.model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    print(f"stopped at step {STEPS // 2} and resumed: the same {len(again)} tensors, bit for bit")
    with torch.no_grad():
        print("counts on with", model(torch.arange(8)[None]).logits[0, -1].argmax().item())
    return trainer


# %%
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    history = [row for row in main().state.log_history if "loss" in row]
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    axes.plot([row["step"] for row in history], [row["loss"] for row in history])
    axes.set(xlabel="step", ylabel="loss")
    replaced = axes.twinx()
    replaced.plot([row["step"] for row in history], [row["sparsae/swaps"] for row in history], color="C1")
    replaced.set(ylabel="connections replaced so far", ylim=(0, None))
    plt.show()
