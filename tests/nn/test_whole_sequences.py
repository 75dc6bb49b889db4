"""Hidden states of whole sequences: those of transformers, by causal attention without a mask when compiled too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import Lfm2Config, Lfm2Model, Qwen3NextConfig, Qwen3NextModel

from sparsae.config.schema import ModelConfig
from sparsae.families import FAMILIES
from sparsae.models import build_model, hidden_states
from sparsae.nn import attention

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, "pad_token_id": None}


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}


def of_family(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = ModelConfig(family=family, width=32, heads=2, layers=2, context=16, transformers=settings)
    return build_model(config, 50, 0, device="cpu").base_model


CASES: dict[str, Callable[[], Any]] = {
    **{family: partial(of_family, family) for family in ("gpt2", "llama", "qwen3")},
    "window": partial(of_family, "qwen3", **WINDOW),
}


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_those_of_transformers(case: str, tokens: Tensor) -> None:
    decoder = CASES[case]()
    want = decoder(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    assert torch.equal(hidden_states(decoder, tokens), want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which an old torch looks at
@pytest.mark.parametrize("case", CASES)
def test_compiled_attention_has_a_mask_only_where_it_hides_something(
    case: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, found = CASES[case](), []
    if case != "window":  # Versions of transformers make one in compiled code, once they are asked.
        monkeypatch.delattr(attention, "sdpa_mask")

    def look(graph: fx.GraphModule, inputs: object) -> Any:
        found.extend(node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target))
        return graph.forward

    want = hidden_states(decoder, tokens)
    got = hidden_states(torch.compile(decoder, backend=look), tokens)
    assert torch.allclose(got, want, atol=1e-5)
    assert len(found) == 2
    for node in found:
        masked = node.kwargs.get("attn_mask") is not None
        assert masked == (case == "window")
        assert node.kwargs["is_causal"] != masked


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3NextModel(Qwen3NextConfig(**SMALL | {"num_hidden_layers": 4})),
        lambda: Lfm2Model(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])),
    ],
)
def test_a_decoder_that_keeps_more_than_keys_and_values_is_left_alone(
    make: Callable[[], Any], registered: bool, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make()
    family = replace(FAMILIES["llama"], model_type=decoder.config.model_type)
    monkeypatch.setattr(FAMILIES, "of", lambda model: family if registered else None)
    want = decoder(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    assert torch.equal(hidden_states(decoder, tokens), want)


@pytest.fixture
def tokens() -> Tensor:
    return torch.arange(24).view(2, 12) % 50
