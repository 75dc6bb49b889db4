"""Under activation checkpointing, which computes the layers anew, an architecture trains as it does without."""

from __future__ import annotations

import pytest
import torch

from sparsae.nn.linear import sparse_layers
from tests.support.architectures import ARCHITECTURES, RULES, train_sparse

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.refusal is None])
def test_checkpointing_changes_nothing(name: str, rule: str) -> None:
    architecture = ARCHITECTURES[name]
    if not architecture.checkpointing:
        with pytest.raises(ValueError, match="does not support activation checkpointing"):
            train_sparse(architecture, rule, checkpointing=True)
        return
    model, losses = train_sparse(architecture, rule)
    again, losses_again = train_sparse(architecture, rule, checkpointing=True)
    # Not to the last bit: on some processors the gradients of a dense GPT-2 are summed in another order, too.
    assert losses_again == pytest.approx(losses, rel=1e-5)
    for name_, layer in sparse_layers(model).items():
        twin = sparse_layers(again)[name_]
        assert torch.equal(layer.indices, twin.indices)
        torch.testing.assert_close(layer.values, twin.values, rtol=1e-4, atol=1e-6)
