"""Cross entropy and divergence of rows of logits with their gradient, each logit read twice and its gradient written.

    L = ce_weight sum CE + kl_weight sum KL(teacher || student)

`sparsae.losses` has the formula in torch's operators, which keep five tensors of the size of the logits in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # logits of a row at a time


def losses_and_gradient(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    ignore_index: int | None,
    ce_weight: float,
    kl_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum of CE, sum of KL, dL / dlogits), the first two in float32; the last in the dtype of the logits, or None.

    logits: (tokens, vocabulary), contiguous, as are teacher_logits, of the first tokens or all. targets: (tokens,)
    int64; `ignore_index` counts in neither sum. The CE of a target that counts and is no class is NaN.
    """
    tokens, vocabulary = logits.shape
    sums = torch.empty(2, tokens, dtype=torch.float32, device=logits.device)
    found = torch.empty_like(logits) if gradient else None
    taught = 0 if teacher_logits is None else teacher_logits.shape[0]
    if tokens:
        _rows[(tokens,)](
            *(logits, logits if teacher_logits is None else teacher_logits, targets.contiguous(), sums),
            *(logits if found is None else found, vocabulary, tokens, taught),
            *(torch.iinfo(torch.int32).min if ignore_index is None else ignore_index, ce_weight, kl_weight),
            TEACHES=taught > 0,
            GRADIENT=gradient,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
        )
    cross_entropy, divergence = sums.sum(1).unbind()
    return cross_entropy, divergence, found


@triton.jit
def _logsumexp(row, vocabulary, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    # As small as can be, not -inf: the difference of two such would be no number.
    largest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        x = tl.load(row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, -1e38)
        above = tl.maximum(largest, x)
        total = total * tl.exp(largest - above) + tl.exp(x - above)
        largest = above
    most = tl.max(largest, 0)
    return most + tl.log(tl.maximum(tl.sum(total * tl.exp(largest - most), 0), 1e-37))


@triton.jit(do_not_specialize=["tokens", "taught", "ignored", "ce_weight", "kl_weight"])
def _rows(
    logits,
    teacher,
    targets,
    sums,
    gradient,
    vocabulary,
    tokens,
    taught,
    ignored,
    ce_weight,
    kl_weight,
    TEACHES: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    offset = token.to(tl.int64) * vocabulary
    target = tl.load(targets + token)
    counts = target != ignored
    lanes = tl.arange(0, BLOCK)
    own = _logsumexp(logits + offset, vocabulary, BLOCK)
    is_class = (target >= 0) & (target < vocabulary)
    at_target = tl.load(logits + offset + target, mask=is_class, other=float("nan")).to(tl.float32)
    tl.store(sums + token, tl.where(counts, own - at_target, 0.0))
    learns = counts & (token < taught)
    # Of a token that is not taught nothing is read.
    learned, other = tl.where(learns, vocabulary, 0), 0.0
    if TEACHES:
        other = _logsumexp(teacher + offset, learned, BLOCK)
    parts = tl.zeros([BLOCK], tl.float32)
    ce_scale, kl_scale = tl.where(counts, ce_weight, 0.0), tl.where(learns, kl_weight, 0.0)
    if GRADIENT or TEACHES:
        for start in range(0, vocabulary, BLOCK):
            place = start + lanes
            inside = place < vocabulary
            log_p = tl.load(logits + offset + place, mask=inside, other=0.0).to(tl.float32) - own
            log_p = tl.where(inside, log_p, -1e38)
            p = tl.exp(log_p)
            slope = (p - tl.where(place == target, 1.0, 0.0)) * ce_scale
            if TEACHES:
                known = place < learned
                log_q = tl.load(teacher + offset + place, mask=known, other=0.0).to(tl.float32) - other
                q = tl.exp(tl.where(known, log_q, -1e38))
                parts += tl.where(q > 0.0, q * (log_q - log_p), 0.0)
                slope += (p - q) * kl_scale
            if GRADIENT:
                slope = tl.where(counts, slope, 0.0)
                tl.store(gradient + offset + place, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.store(sums + tokens + token, tl.sum(parts, 0))
