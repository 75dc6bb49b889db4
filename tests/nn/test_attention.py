"""When the attention of transformers' models is the native one, and that it is the same function then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sparsae import models
from sparsae.config.schema import ModelConfig
from sparsae.kernels.cpu import breakeven, native
from sparsae.kernels.registry import BACKENDS
from sparsae.models import build_model
from sparsae.nn import attention
from sparsae.train.pretrained import read_model

TOKENS = 160
pytestmark = pytest.mark.skipif(
    native.absence() is not None or native.isa() not in breakeven.ATTENTION, reason="torch's attention is used here"
)


def model_of(family: str, **settings: Any) -> Any:
    config = ModelConfig(family=family, width=64, heads=4, layers=2, context=256, **settings)
    torch.manual_seed(0)
    return build_model(config, 257, 0, device="cpu").train()


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    function = BACKENDS["cpu"].attention
    monkeypatch.setattr(BACKENDS["cpu"], "attention", counted)
    return calls


def tokens_of(count: int = TOKENS) -> torch.Tensor:
    return torch.arange(2 * count).view(2, count) % 257


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_training_step_is_that_of_transformers(family: str, native_calls: list[int]) -> None:
    model = model_of(family)
    gradients = []
    for name in (attention.NAME, "sdpa"):
        model.config._attn_implementation = name
        loss = model(tokens_of(), labels=tokens_of(), use_cache=False).loss
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(native_calls) == 2
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * (1 + float(other.abs().max())))


def test_the_configuration_that_is_saved_does_not_name_it() -> None:
    assert "_attn_implementation" not in model_of("gpt2").config.to_json_string()


def test_padding_dropout_short_sequences_and_autocast_are_torchs(native_calls: list[int]) -> None:
    model = model_of("llama")
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :9] = 0
    model(tokens_of(), attention_mask=mask, use_cache=False)
    model(tokens_of(breakeven.ATTENTION[native.isa()] - 1), use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_of(), use_cache=False)
    model_of("gpt2", dropout=0.1)(tokens_of(), use_cache=False)
    model.double()(tokens_of(), use_cache=False)
    assert not native_calls


def test_cached_keys_are_torchs(native_calls: list[int]) -> None:
    model = model_of("llama").eval()

    def continued() -> torch.Tensor:
        whole = torch.ones(2, 150, dtype=torch.int64)
        made: torch.Tensor = model.generate(
            tokens_of(150), attention_mask=whole, max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        return made

    made = continued()
    assert len(native_calls) == 2  # the prompt's
    model.config._attn_implementation = "sdpa"
    assert torch.equal(made, continued())


def test_transforms_and_watchers_see_operators(native_calls: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of("gpt2").eval()
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        out: Any = torch.func.functional_call(model, given, (tokens_of(),), {"use_cache": False})
        return out.logits.square().mean()

    torch.func.grad(loss)(parameters)
    with FlopCounterMode(display=False):
        model(tokens_of(), use_cache=False)
    assert not native_calls


def test_grouped_heads_are_shared(native_calls: list[int]) -> None:
    model = model_of("llama", kv_heads=2)
    y = model(tokens_of(), use_cache=False).logits
    model.config._attn_implementation = "sdpa"
    assert torch.allclose(model(tokens_of(), use_cache=False).logits, y, atol=1e-5)
    assert len(native_calls) == 2


def test_attention_that_is_not_causal_is_torchs(native_calls: list[int]) -> None:
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    q = torch.randn(1, 2, TOKENS, 16)
    attention.attention_forward(module, q, q, q, None)
    attention.attention_forward(nn.Module(), q, q, q, None, is_causal=False)
    assert not native_calls
    attention.attention_forward(nn.Module(), q, q, q, None)
    assert native_calls


def others() -> list[Any]:
    """Configurations of models that take no attention by its name, or not all of what theirs is told."""
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 32}
    heads: dict[str, Any] = {**sizes, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped: dict[str, Any] = {**heads, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    neo: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    return [
        transformers.BloomConfig(**sizes, n_layer=2, n_head=4),
        transformers.FalconConfig(**heads),
        transformers.GPTNeoConfig(**sizes, **neo, window_size=64, max_position_embeddings=256),
        transformers.Gemma2Config(**grouped, pad_token_id=0, bos_token_id=1, eos_token_id=1),
        transformers.MistralConfig(**grouped, sliding_window=50),
    ]


@pytest.mark.parametrize("config", others(), ids=lambda config: config.model_type)
def test_models_that_cannot_take_it_attend_as_ever(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native_calls: list[int]
) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    expected = model(tokens_of(), use_cache=False).logits
    assert torch.equal(read_model(tmp_path).eval()(tokens_of(), use_cache=False).logits, expected)
    monkeypatch.setattr(models, "transformers_config", lambda *_: config)
    built = build_model(ModelConfig(), 257, 0, device="cpu").eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(tokens_of(), use_cache=False).logits, expected)
    assert not native_calls
