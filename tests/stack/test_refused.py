"""What a program of several runs refuses."""

from __future__ import annotations

import pytest
from transformers import AutoModel, BloomConfig

from sparsae.errors import InputError
from sparsae.stack.program import StackedDecoder


def test_a_model_that_attends_by_itself_is_refused() -> None:
    decoder = AutoModel.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(InputError, match="BloomModel computes its attention itself"):
        StackedDecoder(decoder)
