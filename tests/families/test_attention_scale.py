"""The scale of attention: what configurations say of it, what parameterizations set, and what an export keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsae.config import ModelConfig
from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.models import attention_modules, build_model, fold_attention_scale
from sparsae.nn.sparsify import sparsify
from sparsae.train.model import require_fit

ENTRIES: list[dict[str, Any]] = [
    {},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize("entries", ENTRIES, ids=str)
def test_a_folded_model_is_the_same_to_whoever_loads_it(
    entries: dict[str, Any], scale: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=3, width=32, heads=2, context=16, vocab_size=50, transformers=entries)
    model = build_model(config, 50, 0, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sparse = sparsify(model, 0.5)
    for attention in attention_modules(sparse) if scale else ():
        attention.scaling = scale
    tokens = torch.arange(12)[None]
    before = sparse.eval()(tokens).logits.detach()
    fold_attention_scale(sparse)
    assert torch.allclose(sparse(tokens).logits, before, atol=1e-4)
    sparse.save_pretrained(tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert torch.allclose(loaded(tokens).logits, before, atol=1e-4)


@pytest.mark.parametrize("name", ["mup", "supar"])
def test_entries_that_a_parameterization_would_overwrite_are_refused(name: str) -> None:
    for entries in ENTRIES[1:]:
        settings = [f"parameterization.name={name}", f"model.transformers={entries}".replace("'", "")]
        with pytest.raises(
            InputError, match=rf"model\.transformers: parameterization '{name}' scales attention itself"
        ):
            require_fit(resolve(None, "demo", "sparsae", settings))
        require_fit(resolve(None, "demo", "sparsae", settings[1:]))
    others = [f"parameterization.name={name}", "model.transformers={layer_norm_epsilon: 1.0e-6}"]
    require_fit(resolve(None, "demo", "sparsae", others))


LLAMA = ["model.family=llama", "model.layers=1", "model.heads=4", "model.head_size=24"]


def test_heads_that_divide_no_width_are_told_where_the_family_wants_them_to() -> None:
    with pytest.raises(InputError, match="width 66 is not a multiple of heads 4"):
        resolve(None, "demo", "dense", [*LLAMA, "model.width=66"])
    require_fit(resolve(None, "demo", "dense", [*LLAMA, "model.width=66", "model.family=qwen3"]))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("width", [64, 68, 96, 100])
def test_a_narrow_dense_model_can_be_built(family: str, width: int) -> None:
    settings = [*LLAMA, f"model.width={width}", f"model.family={family}"]
    require_fit(resolve(None, "demo", "dense-small", settings))
