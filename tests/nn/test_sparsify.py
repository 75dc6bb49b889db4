"""Models into sparse ones and back: which layers, how many connections, and the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsae.core.heads import HeadLayout
from sparsae.core.observation import head_densities
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.kinds.conv1d import Conv1D
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.nn.tensors import load_model, model_tensors


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)).eval()


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
            pad_token_id=None,
        )
    ).eval()


def nnz(model: nn.Module) -> int:
    return sum(layer.topology.nnz for layer in sparse_layers(model).values())


@pytest.mark.parametrize("budget", ["uniform", "er", "erk"])
@pytest.mark.parametrize(
    ("sparsity", "unit"),
    [(0.5, (1, 1)), (0.97, (1, 1)), (0.9, (4, 4)), (0.97, (4, 4)), (0.5, (16, 16)), (0.9, (16, 16))],
)
def test_the_model_has_exactly_k(budget: str, sparsity: float, unit: tuple[int, int]) -> None:
    model = gpt2()
    weights = sum(
        module.weight.numel() for name, module in model.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc"))
    )
    sparsify(model, sparsity, budget=budget, unit=unit)
    units = weights // (unit[0] * unit[1])
    assert nnz(model) == round((1 - sparsity) * units) * unit[0] * unit[1]
    assert len(sparse_layers(model)) == 8


def test_conv1d_layers_keep_their_active_weights_and_their_function() -> None:
    model, dense = gpt2(), gpt2()
    sparsify(model, 0.8)
    for name, layer in sparse_layers(model).items():
        module = dense.get_submodule(name)
        assert isinstance(layer.kind, Conv1D)
        assert (layer.out_features, layer.in_features) == tuple(module.weight.shape)[::-1]
        with torch.no_grad():
            module.weight.mul_(layer.topology.to_mask().T)
        assert torch.equal(layer.dense_weight(), module.weight.T)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [gpt2, lambda: llama(True), lambda: llama(False)], ids=["gpt2", "tied", "untied"])
def test_densify_is_the_way_back(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = sparsify(make(), 0.7, unit=(4, 4))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model(tokens).logits
        densify(model)
        assert not sparse_layers(model)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(tokens).logits, before, rtol=1e-5, atol=1e-6)


def test_embeddings_norms_and_heads_stay_dense_unless_asked() -> None:
    for tied in (True, False):
        model = sparsify(llama(tied), 0.5)
        assert not isinstance(model.lm_head, SparseLinear)
        assert len(sparse_layers(model)) == 14
    assert isinstance(sparsify(llama(False), 0.5, sparsify_head=True).lm_head, SparseLinear)
    # A tied head is the embedding: it cannot be sparse without making that sparse too.
    assert not isinstance(sparsify(llama(True), 0.5, sparsify_head=True).lm_head, SparseLinear)


def test_include_and_exclude_choose_by_name() -> None:
    model = sparsify(gpt2(), 0.5, include=["*.mlp.*"], exclude=["*.h.0.*"])
    assert list(sparse_layers(model)) == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]


def test_layers_that_read_their_weight_themselves_are_left_alone() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model = sparsify(nn.Sequential(encoder, normed, nn.Linear(16, 16)), 0.5)
    assert list(sparse_layers(model)) == ["2"]
    model(torch.randn(2, 3, 16)).sum().backward()
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 16))


def test_a_layer_with_two_names_stays_one_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.append(model[0])
    sparsify(model, 0.5)
    assert model[0] is model[2]
    assert isinstance(model[0], SparseLinear)
    densify(model)
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Linear)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    heads = {"transformer.h.1.attn.c_attn": HeadLayout("out", 8)}
    model = gpt2()
    with pytest.raises(InputError, match="head_min_density"):
        sparsify(model, 0.9, heads=heads, head_min_density=0.3)
    assert not sparse_layers(model)


def test_unsorted_indices_are_refused() -> None:
    layer = SparseLinear(Topology.from_indices((3, 4), torch.tensor([1, 5, 7])), torch.ones(3))
    with pytest.raises(InputError, match="not sorted"):
        layer.load_state_dict({"values": torch.ones(3), "indices": torch.tensor([5, 1, 7], dtype=torch.int32)})


def test_the_same_seed_draws_the_same_topology() -> None:
    one, two, other = (sparsify(gpt2(), 0.9, seed=seed) for seed in (1, 1, 2))
    for name, layer in sparse_layers(one).items():
        assert torch.equal(layer.indices, sparse_layers(two)[name].indices)
        assert not torch.equal(layer.indices, sparse_layers(other)[name].indices)


def test_density_bounds_hold_and_erk_is_re_solved() -> None:
    model = sparsify(gpt2(), 0.9, max_density=0.11, min_density=0.08)
    densities = [layer.topology.density for layer in sparse_layers(model).values()]
    assert max(densities) <= 0.11
    assert min(densities) >= 0.08
    assert len(set(densities)) > 1


def test_every_head_gets_its_floor() -> None:
    heads = {f"transformer.h.{i}.attn.c_attn": HeadLayout("out", 8) for i in range(2)}
    model = sparsify(gpt2(), 0.95, heads=heads, head_min_density=0.03)
    for name, layout in heads.items():
        densities = head_densities(sparse_layers(model)[name].topology, layout)
        assert densities.numel() == 12
        assert float(densities.min()) >= 0.03


def test_a_state_dict_with_another_topology_loads() -> None:
    one, two = sparsify(gpt2(), 0.9, seed=1), sparsify(gpt2(), 0.8, seed=2, budget="uniform")
    two.load_state_dict(one.state_dict())
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(one(tokens).logits, two(tokens).logits)
    three = sparsify(gpt2(), 0.7, seed=3)
    load_model(three, model_tensors(one))
    with torch.no_grad():
        assert torch.equal(one(tokens).logits, three(tokens).logits)


def test_moving_and_casting_keep_the_topology() -> None:
    layer = SparseLinear(Topology.from_indices((3, 4), torch.tensor([1, 5, 7])), torch.ones(3))
    layer.double()
    assert layer.values.dtype == torch.float64
    assert layer.indices.dtype == torch.int32
    assert layer(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert "nnz=3" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: must be a number such as 0.9, from 0 to below 1, not 1.0"),
        ({"sparsity": -0.1}, "from 0 to below 1, not -0.1"),
        ({"unit": (5, 5)}, r"^unit 5x5 does not divide layer transformer\.h\.0\.attn\.c_attn of 96x32"),
        ({"include": ["nope"]}, "no layer to sparsify"),
        ({"max_density": 0.05}, "bounds hold between"),
        ({"budget": "rand"}, "budget: must be one of uniform, er, erk, not 'rand'"),
    ],
)
def test_what_cannot_be_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sparsify(gpt2(), **arguments)  # type: ignore[arg-type]


def test_a_floor_that_cannot_be_held_is_named() -> None:
    heads = {"transformer.h.0.attn.c_attn": HeadLayout("out", 8)}
    with pytest.raises(InputError, match=r"head_min_density 0\.3 needs"):
        sparsify(gpt2(), 0.9, heads=heads, head_min_density=0.3)


def test_a_bare_linear_layer_is_refused() -> None:
    with pytest.raises(InputError, match="itself a layer"):
        sparsify(nn.Linear(4, 4), 0.5)


def test_a_model_that_is_sparse_already_is_told_so() -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)
    with pytest.raises(InputError, match="no layer to sparsify: 2 sparse already"):
        sparsify(model, 0.9)
