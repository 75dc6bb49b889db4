"""What a program of several runs refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, BloomConfig, MistralConfig

from sparsae.errors import InputError
from sparsae.stack.program import StackedDecoder
from tests.support.architectures import LLAMA

TOKENS = torch.arange(12)[None]


def test_a_model_that_attends_by_itself_is_refused() -> None:
    decoder = AutoModel.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(InputError, match="BloomModel computes its attention itself"):
        StackedDecoder(decoder, TOKENS)


def test_a_model_that_does_not_attend_to_all_tokens_is_refused() -> None:
    decoder = AutoModel.from_config(MistralConfig(**LLAMA, sliding_window=8))
    with pytest.raises(InputError, match="MistralModel does not attend to all 12 tokens"):
        StackedDecoder(decoder, TOKENS)
    for length in (5, 8):  # transformers has a mask as long as the window, which hides nothing
        StackedDecoder(decoder, TOKENS[:, :length])
    assert decoder.config._attn_implementation == "sdpa"
