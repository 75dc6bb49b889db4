"""A network that is sparse from its first step, in a training loop of your own: `python examples/own_loop.py`.

Three things are new beside a dense loop: `sparsify`, the `Sparsifier`, and two calls around the optimizer's step.
"""

import torch
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


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
    )
    # Nine in ten weights of the two large layers do not exist from here on; the small first and last stay dense.
    sparsify(model, sparsity=0.9, exclude=["0", "6"])
    print(summary(model))

    optimizer = AdamW(parameter_groups(model, weight_decay=0.01), lr=3e-3)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=STEPS))
    connections = sparsifier.nnz
    for step in range(STEPS):
        x, label = batch(step)
        loss = nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()  # after the backward pass, before clipping
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update = sparsifier.after_step()
        if update is not None:  # the topology moved: as many connections grown as dropped
            print(f"step {step + 1}: {update.row['swaps']} connections replaced, loss {loss.item():.3f}")

    x, label = batch(STEPS)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == label).float().mean().item()
    assert sparsifier.nnz == connections
    print(f"{connections:,} connections; {accuracy:.0%} of new points are right")


if __name__ == "__main__":
    main()
