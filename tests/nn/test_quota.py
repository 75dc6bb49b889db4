"""sparsify(unit="2:4"): from random, trained, pruned and masked weights; what does not fit is one line."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae import InputError, densify, sparse_layers, sparsify, summary
from sparsae.config.unit import Quota
from tests.support.architectures import ARCHITECTURES


def dense(rows: int = 8, columns: int = 16, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(columns, rows), nn.ReLU(), nn.Linear(rows, columns))


def largest(weight_OI: Tensor, quota: Quota) -> Tensor:
    """The mask of the largest of every group, of weights that differ."""
    groups = weight_OI.abs().reshape(-1, quota.of)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(quota.active, dim=1).indices, True).view_as(weight_OI)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4), st.integers(2, 8), st.data())
def test_magnitude_keeps_the_largest_of_each_group(seed: int, rows: int, groups: int, of: int, data: Any) -> None:
    quota = Quota(data.draw(st.integers(1, of - 1)), of)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(groups * of, rows))
    weight = model[0].weight.detach().clone()
    layer: Any = sparsify(model, unit=str(quota), start="magnitude")[0]  # type: ignore[index]
    assert torch.equal(layer.topology.to_mask(), largest(weight, quota))
    assert torch.equal(layer.dense_weight(), weight * largest(weight, quota))


def test_nonzero_recognizes_pruned_weights_and_makes_up_for_further_zeros() -> None:
    model, quota = dense(), Quota(2, 4)
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight *= largest(model[i].weight, quota)
        model[0].weight[0] = 0.0
    before = model(torch.ones(1, 16))
    weight = model[0].weight.detach().clone()
    sparsify(model, unit="2:4", start="nonzero")
    assert torch.equal(model[0].dense_weight(), weight)
    assert [str(layer.quota) for layer in sparse_layers(model).values()] == ["2:4", "2:4"]
    assert summary(model).asked == 0.5
    assert torch.allclose(model(torch.ones(1, 16)), before, atol=1e-6)
    for unit in ("1:4", "1:8"):
        with pytest.raises(InputError, match=r"of 32 groups of 4 weights of layer 0|of 16 groups of 8") as caught:
            sparsify(densify(copy.deepcopy(model)), unit=unit, start="nonzero")
        assert "nonzero" in str(caught.value)
    sparsify(densify(model), 0.5, unit="4:8", start="nonzero")  # a coarser quota that they keep as well


def test_masks_have_to_keep_it_exactly() -> None:
    model = dense()
    masks = {name: largest(model.get_submodule(name).weight, Quota(2, 4)) for name in ("0", "2")}
    again = sparsify(copy.deepcopy(model), unit="2:4", start=masks)
    assert torch.equal(again[0].topology.to_mask(), masks["0"])  # type: ignore[index]
    masks["2"][3, :4] = False
    with pytest.raises(InputError, match="1 of 32 groups of 4 weights of layer 2 do not have 2 active ones"):
        sparsify(model, unit="2:4", start=masks)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"unit": "2:5"}, "^unit 2:5 does not divide the 16 input features of layer 0"),
        ({"unit": "2:4", "sparsity": 0.9}, "unit 2:4 has sparsity 0.5, not 0.9"),
        ({"unit": "2:4", "density": {"0": 0.5}}, "leave out density"),
        ({"unit": "2:4", "fan_in": (1, 1), "fan_out": (1, 1)}, "leave out fan_in, fan_out"),
        ({"unit": "4:4"}, "N < M"),
        ({"unit": "0:4"}, "N:M"),
        ({"unit": "two"}, "N:M"),
        ({"unit": "2:4", "start": "nonzero"}, "no weight is zero"),
        ({"unit": "2:4", "start": "nonzero", "min_density": 0.1}, "leave out min_density"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: dict[str, Any], line: str) -> None:
    model = dense()
    with pytest.raises(InputError, match=line) as caught:
        sparsify(model, **arguments)
    assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.Linear


def test_convolutions_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    with pytest.raises(InputError, match=r"0 is a convolution: leave it out with exclude$"):
        sparsify(model, unit="2:4")
    sparsify(model, unit="2:4", exclude=["0"])
    assert [str(layer.quota) for layer in sparse_layers(model).values()] == ["2:4"]


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral"])
def test_it_goes_along_inputs_however_the_dense_weight_lies(name: str, tmp_path: Any) -> None:
    model: Any = ARCHITECTURES[name].build().eval()
    sparsify(model, unit="1:4")
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in sparse_layers(each).values():
            assert layer.unit_name == "1:4"
            assert "unit=1:4" in repr(layer)
            assert bool((layer.dense_weight().reshape(-1, 4) != 0).sum(1).le(1).all())
            assert bool((layer.topology.to_mask().reshape(-1, 4).sum(1) == 1).all())
    assert " 1:4 " in str(summary(model))
