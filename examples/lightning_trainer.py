# %% [markdown]
"""# The Trainer of Lightning

A network that Lightning trains sparse from the first step: `python examples/lightning_trainer.py`.

`sparsify` belongs into the module's `__init__`, one callback into the Trainer; `training_step` adds what the teacher
says. Stopped at half and resumed, training ends as if it had not been stopped, bit for bit. Wants
`pip install lightning`; docs/trainers.md tells the rest.
"""

# %%
import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsae import AdamW, parameter_groups, sparsify
from sparsae.config import TeacherConfig
from sparsae.integrations.lightning import SparsaeCallback

EPOCHS = 20

# %% [markdown]
# The module is made sparse when it is made, and asks the callback for what the teacher adds to the loss.


# %%
class Spirals(LightningModule):
    """Tells which of two spirals a point lies on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 2),
        )
        sparsify(self.net, sparsity=0.9, exclude=["0", "6"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, label = batch
        logits = self.net(x)
        taught = SparsaeCallback.of(self.trainer).distillation(logits, x)
        return nn.functional.cross_entropy(logits, label) + taught

    def configure_optimizers(self) -> AdamW:
        return AdamW(parameter_groups(self, weight_decay=0.01), lr=3e-3)


def points(count: int, seed: int) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    label, radius = torch.randint(2, (count,), generator=rng), torch.rand(count, generator=rng)
    angle = 6 * radius + torch.pi * label
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label)


# %% [markdown]
# The callback goes to the Trainer, as others do.


# %%
def train(folder: str, checkpoint: str | None = None) -> tuple[Spirals, SparsaeCallback]:
    torch.manual_seed(0)
    module, callback = Spirals(), SparsaeCallback(module="net", teacher=TeacherConfig(beta=0.9, alpha=0.1))
    kept = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, callbacks=[callback, kept], **quiet
    )
    # Lightning keeps no state of random numbers: a resumed epoch shuffles otherwise, so the order is that of the rows.
    trainer.fit(module, DataLoader(points(4096, 0), batch_size=256), ckpt_path=checkpoint)
    return module, callback


# %% [markdown]
# One training without a stop, one from its checkpoint, and their weights beside each other; then what the network
# makes of the plane.


# %%
def main() -> Spirals:
    with tempfile.TemporaryDirectory() as folder:
        module, callback = train(folder)
        resumed, _ = train(folder, f"{folder}/epoch={EPOCHS // 2 - 1}.ckpt")
    ours, theirs = module.state_dict(), resumed.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    updates = len(callback.rows) - 1
    print(f"{callback.sparsifier.nnz:,} connections, {updates} updates of the topology")
    print(f"stopped at epoch {EPOCHS // 2} and resumed: the same {len(ours)} tensors, bit for bit")
    x, label = points(1000, 1).tensors
    with torch.no_grad():
        accuracy = (module.eval().net(x).argmax(1) == label).float().mean().item()
    print(f"{accuracy:.0%} of new points are right")
    return module


# %%
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    net, side = main().net, torch.linspace(-1, 1, 200)
    with torch.no_grad():
        plane = net(torch.cartesian_prod(side, side)).softmax(1)[:, 1].reshape(200, 200).T
    x, label = points(400, 1).tensors
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    drawn = axes.contourf(side, side, plane, levels=10, cmap="RdBu", alpha=0.6)
    axes.scatter(*x.T, c=label, cmap="RdBu", edgecolors="black", linewidths=0.5, s=12)
    figure.colorbar(drawn, label="probability of the second spiral")
    plt.show()
