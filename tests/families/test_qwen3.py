"""Qwen3's own: heads of any size, and norms that take any factor out of the projections (see test_families.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsae.config import ModelConfig
from sparsae.config.load import resolve
from sparsae.config.narrow import count_parameters
from sparsae.core.randomness import generator
from sparsae.models import attention_modules, build_model, fold_attention_scale


def test_the_preset_is_the_published_model() -> None:
    config = resolve(None, "qwen3-0.6b")
    assert count_parameters(config.model, config.data.tokenizer_vocab) == 596_049_920  # of Qwen/Qwen3-0.6B
    attention: Any = attention_modules(build_model(config.model, config.data.tokenizer_vocab, 0))[0]
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (2048, 1024)


def test_the_scale_is_folded_into_the_norm_of_the_queries_alone() -> None:
    config = ModelConfig(family="qwen3", layers=1, heads=2, kv_heads=1, head_size=16, width=16, context=8)
    model: Any = build_model(config, 50, 0, device="cpu").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, generator=generator(0, name))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (attention,) = attention_modules(model)
    attention.scaling = 1 / 16
    tokens = torch.arange(8)[None]
    scaled = model(tokens).logits
    fold_attention_scale(model)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["model.layers.0.self_attn.q_norm.weight"]
    torch.testing.assert_close(model(tokens).logits, scaled)
    attention.q_proj.weight *= 4  # where a factor would be lost, but for the epsilon of the norm
    torch.testing.assert_close(model(tokens).logits, scaled, rtol=1e-3, atol=1e-3)
