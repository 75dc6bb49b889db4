"""Cross entropy and distillation over a vocabulary, a chunk of tokens at a time.

    L = CE + alpha KL(teacher || student),    KL = sum_v p_T (log p_T - log p_S),    means over tokens

A teacher may teach the first tokens only: KL is then a mean over these.

The logits of student and teacher are (tokens, vocabulary) matrices, the largest tensors of a small model's training.
They never exist whole: each chunk's logits are computed, turned into a loss and at once into gradients, and
forgotten.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsae.kernels.backend import Backend, LossInputs, LossWeights
from sparsae.kernels.registry import losses_backend
from sparsae.nn.tracing import is_traced, transformed, watched


class LossParts(NamedTuple):
    """Scalars in nats a token: `total` carries the gradient, the two parts do not."""

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor


def language_model_loss(
    hidden_TD: Tensor,
    head: nn.Module,
    targets_T: Tensor,
    *,
    teacher_hidden_TD: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    alpha: float = 0.0,
    chunk: int = 1024,
    ignore_index: int | None = -100,
    head_gradient: bool = True,
) -> LossParts:
    """L of hidden states (tokens, width) through `head` (any module to (tokens, vocabulary)), `chunk` tokens at a time.

    Softmaxes are in float32 or wider. Targets equal to `ignore_index` count in neither mean; None: all count, and a GPU
    is not waited for to count them. `teacher_hidden_TD` may
    have fewer rows than `hidden_TD`: the tokens beyond are not taught. Without gradients enabled none are computed;
    without `head_gradient`, none of the head's parameters. Raises ValueError for another number of targets than of
    tokens, where alpha > 0 and the teacher is incomplete or has more tokens, or where no target counts, and IndexError
    where one that counts is no class; on a GPU, which is not waited for, the loss is NaN or torch's own assertion
    fails.
    """
    if hidden_TD.dim() != 2 or targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"targets {tuple(targets_T.shape)} for hidden states {tuple(hidden_TD.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, not {chunk}")
    if alpha > 0 and (teacher_hidden_TD is None or teacher_head is None):
        raise ValueError("alpha > 0 needs teacher_hidden_TD and teacher_head")
    if teacher_hidden_TD is not None and teacher_hidden_TD.shape[0] > hidden_TD.shape[0]:
        raise ValueError(f"a teacher of {teacher_hidden_TD.shape[0]} tokens for {hidden_TD.shape[0]}")
    if alpha == 0:
        teacher_hidden_TD = teacher_head = None
    parameters = [p for p in head.parameters() if p.requires_grad and head_gradient]
    differentiate = torch.is_grad_enabled()
    inputs = _Inputs(head, targets_T, teacher_hidden_TD, teacher_head, alpha, chunk, ignore_index, differentiate)
    total, cross_entropy, distillation = _ChunkedLoss.apply(inputs, hidden_TD, *parameters)
    return LossParts(total, cross_entropy.detach(), distillation.detach())


def language_model_loss_reference(
    hidden_TD: Tensor,
    head: nn.Module,
    targets_T: Tensor,
    *,
    teacher_hidden_TD: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    alpha: float = 0.0,
    ignore_index: int = -100,
) -> LossParts:
    """The same with whole logits: the twin that `language_model_loss` is tested against."""
    teacher_logits = None
    if alpha > 0 and teacher_hidden_TD is not None and teacher_head is not None:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden_TD)
    return distillation_loss(head(hidden_TD), teacher_logits, targets_T, alpha, ignore_index)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    alpha: float,
    ignore_index: int = -100,
) -> LossParts:
    """L from whole logits (..., vocabulary) and targets (...): for loops that have them. Without teacher, L = CE.

    teacher_logits: of all tokens, or of the first ones (the first sequences of a batch): the others are not taught.
    """
    logits, targets = _wide(student_logits.flatten(0, -2)), targets.flatten()
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=ignore_index)
    if teacher_logits is None:
        return LossParts(cross_entropy, cross_entropy.detach(), torch.zeros_like(cross_entropy.detach()))
    counted = targets[: teacher_logits.flatten(0, -2).shape[0]] != ignore_index
    divergence = summed_divergence(logits, teacher_logits, counted) / max(1, int(counted.sum()))
    return LossParts(cross_entropy + alpha * divergence, cross_entropy.detach(), divergence.detach())


def summed_divergence(student_logits: Tensor, teacher_logits: Tensor, counted: Tensor) -> Tensor:
    """KL(teacher || student) in nats, summed over the tokens that count, from logits (..., vocabulary).

    teacher_logits: of all tokens, or of the first ones. counted: (taught tokens,) of bool.
    """
    taught = _wide(teacher_logits.detach().flatten(0, -2))[counted]
    learning = _wide(student_logits.flatten(0, -2))[: counted.shape[0]][counted]
    return _divergences(learning.log_softmax(-1), taught.log_softmax(-1)).sum()


def _divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q (log q - log p) of every class, 0 where q is: also of a class that neither has."""
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).masked_fill(log_q == -torch.inf, 0.0)


class _Inputs(NamedTuple):
    head: nn.Module
    targets: Tensor
    teacher_hidden: Tensor | None
    teacher_head: nn.Module | None
    alpha: float
    chunk: int
    ignore_index: int | None
    # Asked before the Function runs: inside, gradients are always off, and needs_input_grad does not know of no_grad.
    differentiate: bool


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken chunk by chunk in the forward pass, so that nothing of it is computed twice."""

    @staticmethod
    def forward(ctx: Any, inputs: _Inputs, hidden_TD: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counted = _counted(inputs, inputs.targets)
        if not counted:
            raise ValueError("no target counts: the loss of nothing is not defined")
        # Sums are divided by the targets that count; those of the divergence are fewer where not all are taught.
        rarer = 1.0
        if inputs.teacher_hidden is not None:
            taught = inputs.targets[: inputs.teacher_hidden.shape[0]]
            rarer = counted / max(1, _counted(inputs, taught))
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need and inputs.differentiate]
        # Float16 has no room for a gradient that is divided by all tokens before a GradScaler multiplies it: there,
        # backward divides.
        divisor, waits = counted, 1.0
        if _in_float16(hidden_TD, parameters):
            divisor = max(1, min(inputs.chunk, hidden_TD.shape[0]) // _ROWS_OF_FLOAT16)
            waits = divisor / counted
        sums = torch.zeros(2, dtype=_wide(hidden_TD[:0]).dtype, device=hidden_TD.device)
        grads = [torch.zeros_like(t) if i in wanted else None for i, t in enumerate((hidden_TD, *parameters))]
        if waits != 1:  # many chunks add up to what float16 does not hold
            grads[1:] = [None if grad is None else _wide(grad) for grad in grads[1:]]
        for start in range(0, hidden_TD.shape[0], inputs.chunk):
            rows = slice(start, start + inputs.chunk)
            with torch.set_grad_enabled(bool(wanted)):
                hidden = hidden_TD[rows].detach().requires_grad_(0 in wanted)
                weights = LossWeights(1 / divisor, inputs.alpha * rarer / divisor)
                cross_entropy, divergence, root, slope = _chunk_loss(inputs, hidden, rows, weights)
                if wanted:
                    leaves = [(hidden, *parameters)[i] for i in wanted]
                    chunk_grads = torch.autograd.grad(root, leaves, slope, allow_unused=True)
                    for i, grad in zip(wanted, chunk_grads, strict=True):
                        target = grads[i]
                        if grad is not None and target is not None:
                            (target[rows] if i == 0 else target).add_(grad)
            sums += torch.stack([cross_entropy.detach(), divergence.detach()])
        ctx.save_for_backward(*[grad for grad in grads if grad is not None])
        ctx.wanted, ctx.slots, ctx.waits = wanted, 1 + len(parameters), waits
        ctx.dtypes = [hidden_TD.dtype, *(p.dtype for p in parameters)]
        cross_entropy, divergence = (sums / counted).unbind()
        divergence = divergence * rarer
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return cross_entropy + inputs.alpha * divergence, cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * ctx.slots
        if ctx.waits != 1:
            scale = scale * ctx.waits
        for i, grad in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            found[i] = (grad * scale).to(ctx.dtypes[i])
        return (None, *found)


# Of a chunk, to one that its sums are divided by: the head's gradient is one, and has to stay below 65,504.
_ROWS_OF_FLOAT16 = 64


def _in_float16(hidden: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether logits and their gradient are of float16, by the tensors' own dtype or by autocast's."""
    kind = hidden.device.type
    in_autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return in_autocast or any(tensor.dtype == torch.float16 for tensor in (hidden, *parameters))


def _counted(inputs: _Inputs, targets: Tensor) -> int:
    if inputs.ignore_index is None:
        return targets.numel()
    return int((targets != inputs.ignore_index).sum())


def _chunk_loss(
    inputs: _Inputs, hidden: Tensor, rows: slice, weights: LossWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sums over the chunk's tokens of cross entropy and divergence, and what is differentiated, with its slope.

    weights: of the two sums in the loss.
    """
    targets, logits, teacher_logits = inputs.targets[rows], inputs.head(hidden), None
    if inputs.teacher_head is not None and inputs.teacher_hidden is not None:
        teacher_hidden = inputs.teacher_hidden[rows]
        if teacher_hidden.shape[0]:
            with torch.no_grad():
                teacher_logits = inputs.teacher_head(teacher_hidden)
    backend = _backend(logits.detach(), targets, teacher_logits)
    if backend is not None:
        of_chunk = (logits.detach(), targets, teacher_logits, inputs.ignore_index)
        found = backend.losses(LossInputs(*of_chunk, weights, logits.requires_grad))
        return found.cross_entropy, found.divergence, logits, found.gradient
    cross_entropy, divergence = _sums(logits, teacher_logits, targets, inputs.ignore_index)
    return cross_entropy, divergence, weights[0] * cross_entropy + weights[1] * divergence, None


def _backend(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> Backend | None:
    """Whose kernel reads them; None: whoever looks in sees torch's operators, which also tell what does not fit."""
    given = [logits, targets, *([] if teacher_logits is None else [teacher_logits])]
    if is_traced() or transformed() or any(watched(tensor) or tensor.device != logits.device for tensor in given):
        return None
    if logits.dim() != 2 or not logits.numel() or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        return None
    if teacher_logits is not None:
        taught, classes = teacher_logits.shape if teacher_logits.dim() == 2 else (0, 0)
        if taught > logits.shape[0] or classes != logits.shape[1]:
            return None
    return losses_backend(logits, teacher_logits)


def _sums(
    logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Sums of cross entropy and divergence over the tokens that count, by torch's operators."""
    log_p = _wide(logits).log_softmax(-1)
    # torch ignores one number whatever is asked, -100 if nothing is.
    ignored = torch.iinfo(torch.int64).min if ignore_index is None else ignore_index
    cross_entropy = F.nll_loss(log_p, targets, ignore_index=ignored, reduction="sum")
    if teacher_logits is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    taught, log_q = teacher_logits.shape[0], _wide(teacher_logits).log_softmax(-1)
    divergence = _divergences(log_p[:taught], log_q).sum(-1)
    if ignore_index is not None:
        divergence = divergence * (targets[:taught] != ignore_index)
    return cross_entropy, divergence.sum()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
