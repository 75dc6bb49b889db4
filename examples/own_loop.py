# %% [markdown]
"""# Your own training loop

A network that is sparse from its first step, in a training loop of your own: `python examples/own_loop.py`.

Three things are new beside a dense loop: `sparsify`, the `Sparsifier`, and two calls around the optimizer's step.
"""

# %%
import torch
from matplotlib import pyplot as plt
from torch import nn

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparsify, summary

STEPS = 400


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two spirals, and which of the two each lies on."""
    rng = torch.Generator().manual_seed(step)
    label = torch.randint(2, (256,), generator=rng)
    radius = torch.rand(256, generator=rng)
    angle = 6 * radius + torch.pi * label
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


# %% [markdown]
# Nine in ten weights of the two large layers do not exist from here on; the small first and last stay dense.

# %%
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
)
sparsify(model, sparsity=0.9, exclude=["0", "6"])
print(summary(model))

# %% [markdown]
# An update of the topology drops as many connections as it grows, so their number stays.

# %%
optimizer = AdamW(parameter_groups(model, weight_decay=0.01), lr=3e-3)
sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=STEPS))
connections, first = sparsifier.nnz, model[2].topology.to_mask()
losses, updates = [], {}
for step in range(STEPS):
    x, label = batch(step)
    loss = nn.functional.cross_entropy(model(x), label)
    optimizer.zero_grad()
    loss.backward()
    sparsifier.before_step()  # after the backward pass, before clipping
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update = sparsifier.after_step()
    losses.append(loss.item())
    if update is not None:
        updates[step] = update.row["swaps"]
        print(f"step {step + 1}: {update.row['swaps']} connections replaced, loss {loss.item():.3f}")

# %%
x, label = batch(STEPS)
with torch.no_grad():
    accuracy = (model(x).argmax(1) == label).float().mean().item()
assert sparsifier.nnz == connections
print(f"{connections:,} connections; {accuracy:.0%} of new points are right")

# %% [markdown]
# The loss, and at each update how many connections were replaced.

# %%
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.plot(losses, color="C0")
axes.set(xlabel="step", ylabel="loss")
replaced = axes.twinx()
replaced.vlines(list(updates), 0, list(updates.values()), color="C1", alpha=0.6)
replaced.set(ylabel="connections replaced", ylim=(0, None))
plt.show()

# %% [markdown]
# The first sparse layer at the beginning and at the end: rows are its outputs, columns its inputs, and a dot is a
# connection. Inputs that tell little have lost theirs.

# %%
figure, both = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
for axes, mask, title in zip(
    both, (first, model[2].topology.to_mask()), ("at the beginning", "at the end"), strict=True
):
    axes.imshow(~mask, cmap="gray", interpolation="nearest")
    axes.set(title=title, xlabel="inputs")
both[0].set(ylabel="outputs")
plt.show()
