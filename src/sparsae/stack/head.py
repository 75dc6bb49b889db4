"""Cross entropy over a vocabulary, of several runs as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsae.train.passes import Pass


def is_plain(wanted: Pass, head: nn.Module) -> bool:
    """Whether a pass's loss is cross entropy alone, through a matrix that exists whole."""
    taught = bool(wanted.alpha) and wanted.taught > 0
    return type(head) is nn.Linear and head.bias is None and not taught


def cross_entropies(
    hidden_RTD: Tensor, heads: Sequence[Tensor], targets_RT: Tensor, chunk: int, dtype: torch.dtype
) -> Tensor:
    """(runs,) means in nats a token, differentiable in hidden states and heads (vocabulary, width), a run's each.

    `chunk` tokens of each run at a time; products in `dtype`, the rest in float32 or wider.
    `sparsae.losses.language_model_loss` of one run is the same.
    """
    losses: Tensor = _Loss.apply(targets_RT, chunk, dtype, hidden_RTD, *heads)
    return losses


class _Loss(torch.autograd.Function):
    """Gradients are taken chunk by chunk in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any, targets_RT: Tensor, chunk: int, dtype: torch.dtype, hidden_RTD: Tensor, *heads: Tensor
    ) -> Tensor:
        heads_RVD = torch.stack(heads).to(dtype)
        wide = torch.promote_types(hidden_RTD.dtype, torch.float32)
        tokens = targets_RT.shape[1]
        losses = torch.zeros(len(heads), dtype=wide, device=hidden_RTD.device)
        d_hidden = torch.empty_like(hidden_RTD)
        d_heads = torch.zeros(heads_RVD.shape, dtype=heads[0].dtype, device=hidden_RTD.device)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            hidden, targets_RC1 = hidden_RTD[:, rows].to(dtype), targets_RT[:, rows].unsqueeze(-1)
            logits = torch.bmm(hidden, heads_RVD.mT).to(wide)
            log_p = logits.log_softmax(-1)
            losses -= log_p.gather(-1, targets_RC1).sum((1, 2))
            d_logits = log_p.exp_()
            d_logits.scatter_add_(-1, targets_RC1, torch.full_like(targets_RC1, -1.0, dtype=wide))
            d_logits = d_logits.div_(tokens).to(dtype)
            d_hidden[:, rows] = torch.bmm(d_logits, heads_RVD)
            d_heads += torch.bmm(d_logits.mT, hidden)
        ctx.save_for_backward(d_hidden, d_heads)
        return losses / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale_R: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_heads = ctx.saved_tensors
        scale = scale_R.view(-1, 1, 1)
        return (None, None, None, d_hidden * scale, *(d_heads * scale).unbind())
