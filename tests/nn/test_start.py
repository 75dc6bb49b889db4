"""Models that bring their own zeros, or a mask of what is to stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsae import AdamW, InputError, densify, sparse_layers, sparsify, summary
from sparsae.nn.linear import SparseLinear
from tests.support.architectures import ARCHITECTURES


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Linear(32, 16), nn.Linear(16, 8))


def masks_of(model: nn.Module, share: float, unit: tuple[int, int] = (1, 1)) -> dict[str, Tensor]:
    """Random masks of a model's layers, in whole units, as their weights lie."""
    rng, found = torch.Generator().manual_seed(1), {}
    for name, layer in sparse_layers(sparsify(copy.deepcopy(model), 0.5)).items():
        rows, columns = layer.topology.shape
        units = torch.rand(rows // unit[0], columns // unit[1], generator=rng) < share
        matrix_OI = units.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)
        found[name] = layer.kind.join("weight", {"": matrix_OI}).contiguous()
    return found


def pruned(model: Any, masks: dict[str, Tensor]) -> Any:
    """As pruning leaves a model: zeros in dense weights."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
    return model


def gpt2() -> Any:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**ARCHITECTURES["GPT-2"].settings)).eval()


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(*net()[:2], net()[3], net()[4]), gpt2], ids=["linear", "gpt2"])
def test_zeros_and_masks_are_the_topology(make: Any, unit: tuple[int, int]) -> None:
    masks = masks_of(make(), 0.3, unit)
    dense = pruned(make(), masks)
    for start, model in (("nonzero", copy.deepcopy(dense)), (masks, make())):
        sparsify(model, start=start, unit=unit)
        assert sparse_layers(model).keys() == masks.keys()
        for name, layer in sparse_layers(model).items():
            assert torch.equal(layer.kind.join("weight", {"": layer.topology.to_mask()}), masks[name])
            assert torch.equal(layer.weight.clone(), dense.get_submodule(name).weight)
            assert layer.topology.unit == unit
        asked = summary(model).asked
        assert asked is not None
        assert 0.5 < asked < 0.8
        for name, module in densify(model).named_modules():
            if name in masks:
                assert torch.equal(module.weight, dense.get_submodule(name).weight)


def test_a_block_with_one_weight_exists() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[5, 2] = 1.0
    layer: Any = sparsify(model, start="nonzero", unit=(4, 4))[0]  # type: ignore[index]
    assert layer.topology.indices.tolist() == [1]
    assert layer.values.shape == (1, 4, 4)


def test_a_convolution_has_the_mask_of_its_weight() -> None:
    masks = {"2": torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5}
    dense = pruned(net(), masks)
    x = torch.randn(2, 4, 5, 5)
    for start in ("nonzero", masks):
        model: Any = sparsify(copy.deepcopy(dense), start=start)
        assert [type(module) is SparseLinear for module in model] == [False, False, True, False, False]
        torch.testing.assert_close(model[2](x), dense[2](x))


def test_every_matrix_of_experts_needs_a_mask() -> None:
    model: Any = ARCHITECTURES["Mixtral"].build()
    layers = sparse_layers(sparsify(copy.deepcopy(model), 0.5))
    masks = {n: layer.topology.to_mask() for n, layer in layers.items() if ".0.mlp.experts" in n}
    sparsify(model, start=masks)
    assert {name: tuple(layer.topology.shape) for name, layer in sparse_layers(model).items()} == {
        name: tuple(mask.shape) for name, mask in masks.items()
    }
    masks.pop(next(iter(masks)))
    with pytest.raises(InputError, match=r"there is no mask of .*experts\.0\.gate_up_proj, which becomes sparse with"):
        sparsify(ARCHITECTURES["Mixtral"].build(), start=masks)


def test_what_is_not_pruned_stays_dense_and_a_head_with_a_mask_does_not() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[:4] = 0.0
    sparsify(model, start="nonzero")
    assert list(sparse_layers(model)) == ["3"]
    head = hf.LlamaForCausalLM(hf.LlamaConfig(**ARCHITECTURES["Llama"].settings, tie_word_embeddings=False))
    sparsify(head, start={"lm_head": torch.rand(48, 32) < 0.5})
    assert list(sparse_layers(head)) == ["lm_head"]


def test_the_optimizer_follows() -> None:
    model = pruned(net(), {"3": torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) < 0.5})
    optimizer = AdamW([model[3].weight, model[4].weight], lr=1e-2)
    model[4](model[3](torch.randn(4, 32))).sum().backward()
    optimizer.step()
    moment = optimizer.state[model[3].weight]["exp_avg"].clone()
    mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(2)) < 0.5
    sparsify(model, start={"3": mask}, optimizer=optimizer)
    assert torch.equal(optimizer.state[model[3].values]["exp_avg"], moment.T[mask.T])


def test_what_does_not_fit_is_told_and_changes_nothing() -> None:
    mask = torch.ones(32, 16, dtype=torch.bool)
    mask[:5] = False
    zeros = pruned(net(), {"0": mask})
    empty = pruned(net(), {"0": torch.zeros(32, 16)})

    def refused(match: str, model: Any, *given: Any, **settings: Any) -> None:
        before = list(model)
        with pytest.raises(InputError, match=match) as caught:
            sparsify(model, *given, **settings)
        assert "\n" not in str(caught.value)
        assert list(model) == before

    refused(
        "sparsity 0.9 was asked for, and what start gives has 0.15625: leave sparsity out", zeros, 0.9, start="nonzero"
    )
    refused("no weight is zero", net(), start="nonzero")
    refused("no weight of layer 0 would exist", empty, start="nonzero")
    refused("start: the mask has no layer", net(), start={})
    refused("the mask of 0 must be a bool tensor, not torch.float32", net(), start={"0": mask.float()})
    refused(r"the mask of 0 has shape \(16, 32\), not \(32, 16\)", net(), start={"0": mask.T})
    refused("9 is no layer that can be sparse: the model's are such as 0", net(), start={"9": mask})
    refused("1x1 does not divide|cuts through units of 4x4", net(), start={"0": mask}, unit=(4, 4))
    refused("leave out include and exclude", net(), start={"0": mask}, exclude=["3"])
    refused("leave out budget, fan_in", zeros, start="nonzero", budget="uniform", fan_in=(1, 1))
    same = sparsify(zeros, 1 - 27 / 32, start="nonzero")
    assert list(sparse_layers(same)) == ["0"]
