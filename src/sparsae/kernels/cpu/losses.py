"""Cross entropy and divergence of rows of logits with their gradient, by the native kernels.

`sparsae.losses` has the formula in torch's operators: the twin for tests.
"""

from __future__ import annotations

import ctypes

import torch

from sparsae.kernels.backend import LossInputs, LossSums
from sparsae.kernels.cpu.library import Losses, library


def losses(given: LossInputs) -> LossSums:
    """As `Backend.losses`, of contiguous float32. Raises IndexError for a target that is no place in the vocabulary."""
    logits_TV, targets_T, teacher_TV, ignore_index, weights, gradient = given
    tokens, vocabulary = logits_TV.shape
    targets_T = targets_T.contiguous()
    wrong = (targets_T < 0) | (targets_T >= vocabulary)
    if ignore_index is not None:
        wrong &= targets_T != ignore_index
    if bool(wrong.any()):
        raise IndexError(f"target {int(targets_T[wrong][0])} is out of bounds: there are {vocabulary:,} classes")
    sums = torch.empty(2, tokens, dtype=torch.float32, device="cpu")
    found = torch.empty_like(logits_TV) if gradient else None
    problem = Losses(
        tokens=tokens,
        vocabulary=vocabulary,
        taught=0 if teacher_TV is None else teacher_TV.shape[0],
        ignored=-1 if ignore_index is None else ignore_index,
        logits=logits_TV.data_ptr(),
        teacher=None if teacher_TV is None else teacher_TV.data_ptr(),
        targets=targets_T.data_ptr(),
        sums=sums.data_ptr(),
        gradient=None if found is None else found.data_ptr(),
        ce_weight=weights.cross_entropy,
        kl_weight=weights.divergence,
        threads=torch.get_num_threads(),
    )
    if library().sparsae_losses(ctypes.byref(problem)):
        raise MemoryError("no memory left for the native kernels' workspace")
    cross_entropy, divergence = sums.sum(1).unbind()
    return LossSums(cross_entropy, divergence, found)
