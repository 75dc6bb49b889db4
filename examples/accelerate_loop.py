# %% [markdown]
"""# A loop of accelerate

A loop of your own around accelerate, with a sparse network: `python examples/accelerate_loop.py`.

`attach` hangs the Sparsifier on the optimizer's own step, so that accumulated and skipped steps are none of the loop's
business; `register_for_checkpointing` puts its state, and the teacher, into accelerate's checkpoints. Stopped at half
and resumed, training ends as if it had not been stopped, bit for bit. Wants `pip install accelerate`; docs/trainers.md
tells the rest.
"""

# %%
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsae import AdamW, Sparsifier, SparsifierConfig, distillation_loss, parameter_groups, sparsify
from sparsae.config import TeacherConfig

EPOCHS, PASSES = 20, 2
SAMPLES, BATCH = 1024, 32

# %% [markdown]
# `attach` is all that the loop below has to do with updates of the topology.


# %%
class Training:
    """Everything that a training consists of."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=PASSES)
        model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 32))
        sparsify(model, sparsity=0.9)
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
        x = torch.randn(SAMPLES, 32, generator=torch.Generator().manual_seed(1))
        data = DataLoader(TensorDataset(x, x.argmax(1)), batch_size=BATCH, shuffle=True)
        self.model, self.optimizer, self.data = self.accelerator.prepare(model, optimizer, data)

        steps = EPOCHS * SAMPLES // (BATCH * PASSES)
        teacher = TeacherConfig(beta=0.9, alpha=0.1)
        config = SparsifierConfig(steps=steps, teacher=teacher, accumulation=PASSES)
        self.updates = []
        self.sparsifier = Sparsifier(self.model, self.optimizer, config)
        self.sparsifier.attach(self.updates.append, scaler=self.accelerator.scaler)
        self.accelerator.register_for_checkpointing(self.sparsifier)

    def run(self, epochs: range) -> float:
        for epoch in epochs:
            self.data.set_epoch(epoch)  # how an epoch is shuffled is a function of its number
            for x, label in self.data:
                with self.accelerator.accumulate(self.model):
                    with torch.no_grad():
                        taught = self.sparsifier.teacher.model(x)
                    parts = distillation_loss(self.model(x), taught, label, alpha=0.1)
                    self.accelerator.backward(parts.total)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return float(parts.cross_entropy)


# %% [markdown]
# One training without a stop, one from its checkpoint, and their weights beside each other.


# %%
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Training()
        whole.run(range(EPOCHS // 2))
        whole.accelerator.save_state(folder)
        loss = whole.run(range(EPOCHS // 2, EPOCHS))

        resumed = Training()
        resumed.accelerator.load_state(folder)
        resumed.run(range(EPOCHS // 2, EPOCHS))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    print(f"{whole.sparsifier.nnz:,} connections, {len(whole.updates)} updates of the topology, loss {loss:.3f}")
    print(f"stopped at epoch {EPOCHS // 2} and resumed: the same {len(ours)} tensors, bit for bit")


# %%
if __name__ == "__main__":
    main()
