"""LoRA over a sparse base: the adapter trains, the base stays as it is, and merging says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae import InputError, densify, sparse_layers, sparsify
from tests.support.architectures import ARCHITECTURES

peft = pytest.importorskip("peft")
# peft asks a model of transformers' under a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = {"Llama": ["q_proj", "up_proj", "down_proj"], "GPT-2": ["c_attn", "c_fc"]}


def adapted(name: str) -> Any:
    from sparsae.integrations.peft import over_sparse

    torch.manual_seed(0)
    model = sparsify(ARCHITECTURES[name].build(), 0.7)
    settings = {"fan_in_fan_out": True} if name == "GPT-2" else {}
    return peft.get_peft_model(model, over_sparse(peft.LoraConfig(target_modules=TARGETS[name], r=2, **settings)))


@pytest.mark.parametrize("name", TARGETS)
def test_the_adapter_trains_and_the_base_does_not(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    trains = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains
    assert all("lora_" in n for n in trains)
    before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    layers = len(sparse_layers(model))
    batch = ARCHITECTURES[name].batch(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved == trains
    assert {n for n, parameter in model.named_parameters() if parameter.requires_grad} == trains
    assert len(sparse_layers(model)) == layers
    model.eval().save_pretrained(tmp_path)
    from sparsae.integrations.peft import over_sparse

    torch.manual_seed(0)
    base = sparsify(ARCHITECTURES[name].build(), 0.7)
    again = peft.PeftModel.from_pretrained(
        base, tmp_path, config=over_sparse(peft.LoraConfig.from_pretrained(tmp_path))
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", TARGETS)
def test_merging_is_refused_until_the_base_is_dense(name: str) -> None:
    model = adapted(name).eval()
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if "lora_B" in n:
                parameter.normal_()
    batch = ARCHITECTURES[name].batch(torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(**batch).logits
    with pytest.raises(InputError, match="a merged sparse layer would be dense: keep the adapter") as caught:
        model.merge_and_unload()
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        merged = densify(model).merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_dora_is_refused_where_an_output_has_no_connection() -> None:
    from sparsae.integrations.peft import over_sparse

    torch.manual_seed(0)
    config = over_sparse(peft.LoraConfig(target_modules=["q_proj"], r=2, use_dora=True))
    with pytest.raises(InputError, match=r"outputs of a layer of .* have no connection: use LoRA"):
        peft.get_peft_model(sparsify(ARCHITECTURES["Llama"].build(), 0.95), config)
    model = peft.get_peft_model(sparsify(ARCHITECTURES["Llama"].build(), 0.5, fan_in=(0.5, 2.0)), config)
    assert model(**ARCHITECTURES["Llama"].batch(torch.Generator().manual_seed(0))).loss.isfinite()
