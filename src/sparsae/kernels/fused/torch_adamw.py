"""AdamW of parameters that count their own steps, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sparsae.core.host import on_device


def update_by_parameter(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    counts: Sequence[float],
    rates: Sequence[tuple[float, float]],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of every parameter, in place, by torch's kernel: a launch for each of the `rates` (lr, weight decay).

    counts: steps that each parameter has made.
    """
    made = torch.tensor(counts, dtype=torch.float32, device="cpu")
    steps = on_device(made, parameters[0].device).unbind()  # which torch counts up
    places: dict[tuple[float, float], list[int]] = {}
    for place, rate in enumerate(rates):
        places.setdefault(rate, []).append(place)
    for (lr, weight_decay), chosen in places.items():
        p, g, m, v, t = ([own[at] for at in chosen] for own in (parameters, grads, averages, squares, steps))
        adamw(
            *(p, g, m, v, [], t),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
        )
