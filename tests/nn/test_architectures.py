"""The architectures that people train: each trains with connections that move, or says why it cannot be sparse.

Here under one rule; the soak suite takes another and activation checkpointing.
"""

from __future__ import annotations

import math

import pytest
import torch

from sparsae import InputError, densify, sparsify
from tests.support.architectures import ARCHITECTURES, train_sparse


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_with_exactly_k(name: str) -> None:
    architecture = ARCHITECTURES[name]
    if architecture.refusal is not None:
        with pytest.raises(InputError, match=architecture.refusal):
            sparsify(architecture.build(), 0.7)
        return
    model, losses = train_sparse(architecture, "rigl")
    assert all(map(math.isfinite, losses))
    batch = architecture.batch(torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model.eval()(**batch).loss
        torch.testing.assert_close(densify(model)(**batch).loss, loss, rtol=1e-5, atol=1e-5)
