"""Decoding a token at a time: the fast path against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sparsae.core.randomness import generator
from sparsae.evaluate.decoding import Decoder, FastDecoder, ModelDecoder, open_decoder
from sparsae.nn.sparsify import sparsify

IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def gpt2(**settings: Any) -> nn.Module:
    config = GPT2Config(vocab_size=60, n_positions=24, n_embd=32, n_layer=2, n_head=4, **IDS, **settings)
    return AutoModelForCausalLM.from_config(config)


def llama(**settings: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=60,
        max_position_embeddings=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{"num_key_value_heads": 2, **IDS, **settings},
    )
    return AutoModelForCausalLM.from_config(config)


MODELS = {
    "gpt2": gpt2,
    "gpt2, head of its own": lambda: gpt2(tie_word_embeddings=False, activation_function="relu"),
    "llama, grouped heads": llama,
    "llama, biases": lambda: llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
}


def prepared(name: str, sparsity: float, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator(seed, str(parameter.shape)))
    if sparsity:
        sparsify(model, sparsity, seed=seed, sparsify_head="own" in name)
    return model.eval().requires_grad_(False)


def decoded(decoder: Decoder, tokens: list[int], prompt: int) -> torch.Tensor:
    """(tokens - prompt + 1, vocabulary) logits after each token from the prompt's last on."""
    return torch.stack([decoder.read(tokens[:prompt]).clone(), *(decoder.step(t).clone() for t in tokens[prompt:])])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_fast_path_equals_the_models_own(name: str, sparsity: float) -> None:
    model = prepared(name, sparsity)
    fast = open_decoder(model, context=24)
    assert isinstance(fast, FastDecoder)
    tokens = torch.randint(60, (24,), generator=generator(1, "tokens")).tolist()
    whole = model(input_ids=torch.tensor([tokens])).logits[0]
    for prompt in (1, 9):  # the second reading forgets the first
        got = decoded(fast, tokens, prompt)
        torch.testing.assert_close(got, decoded(ModelDecoder(model), tokens, prompt), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, whole[prompt - 1 :], rtol=1e-4, atol=1e-4)


class Wrapper(nn.Module):
    """Looks like the MLP that it holds, and does something else."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = mlp.c_fc, mlp.act, mlp.c_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.c_proj(self.act(self.c_fc(x)))


def test_what_it_does_not_know_goes_through_the_model() -> None:
    for model in (gpt2(scale_attn_by_inverse_layer_idx=True), gpt2().bfloat16()):
        assert isinstance(open_decoder(model.eval(), 24), ModelDecoder)
    assert isinstance(open_decoder(gpt2().train(), 24), ModelDecoder)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert isinstance(open_decoder(llama(rope_parameters=dynamic).eval(), 24), ModelDecoder)
    wrapped = prepared("gpt2", 0.0)
    wrapped.transformer.h[0].mlp = Wrapper(wrapped.transformer.h[0].mlp)
    assert isinstance(open_decoder(wrapped, 24), ModelDecoder)
    listened = prepared("gpt2", 0.5)
    listened.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    assert isinstance(open_decoder(listened, 24), ModelDecoder)


def test_results_do_not_share_memory() -> None:
    decoder = open_decoder(prepared("gpt2, head of its own", 0.9), 24)
    first = decoder.read([1, 2])
    kept = first.clone()
    second = decoder.step(3)
    decoder.step(4)
    assert torch.equal(first, kept)
    assert not torch.equal(second, kept)
