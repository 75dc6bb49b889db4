"""What a module was before a conversion, it is afterwards: mode, frozen or not, hooks, attributes, both ways."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsae import InputError, SparseLinear, densify, sparsify
from sparsae.nn.linear import sparse_layers
from sparsae.nn.mlp import FusedMLP


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def weight_of(layer: nn.Module) -> nn.Parameter:
    weight = layer.values if isinstance(layer, SparseLinear) else layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


@pytest.mark.parametrize("back", [False, True], ids=["sparsify", "densify"])
def test_frozen_parameters_modes_and_marks_stay(back: bool) -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    model[0].weight._no_weight_decay = True
    model[0].bias.lr_scale = 0.1
    model[2].bias.requires_grad_(False)
    model[2].weight.lr_scale = 0.5
    model[2].note = "mine"
    model[2].register_buffer("seen", torch.ones(3), persistent=False)
    model[2].eval()
    sparsify(model, 0.5)
    if back:
        densify(model)
    assert [weight_of(model[i]).requires_grad for i in (0, 2)] == [False, True]
    assert [model[i].bias.requires_grad for i in (0, 2)] == [True, False]
    assert weight_of(model[0])._no_weight_decay
    assert model[0].bias.lr_scale == 0.1
    assert weight_of(model[2]).lr_scale == 0.5
    assert model[2].note == "mine"
    assert model[2].seen.sum() == 3
    assert "2.seen" not in model.state_dict()
    assert [model[i].training for i in (0, 1, 2)] == [True, True, False]


def test_a_frozen_layer_trains_neither_before_nor_after() -> None:
    model = chain()
    model[0].requires_grad_(False)
    sparsify(model, 0.5)
    model(torch.randn(4, 16)).sum().backward()
    assert model[0].values.grad is None
    assert model[2].values.grad is not None


HOOKS = {
    "forward_pre": lambda m, f: m.register_forward_pre_hook(lambda m, x: f(m)),
    "forward": lambda m, f: m.register_forward_hook(lambda m, x, y, **k: f(m), with_kwargs=False, always_call=True),
    "backward_pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, g: f(m)),
    "backward": lambda m, f: m.register_full_backward_hook(lambda m, g, h: f(m)),
    "state_dict": lambda m, f: m.register_state_dict_post_hook(lambda m, s, p, d: f(m)),
    "state_dict_pre": lambda m, f: m.register_state_dict_pre_hook(lambda m, p, k: f(m)),
    "load_state_dict_pre": lambda m, f: m.register_load_state_dict_pre_hook(lambda m, *a: f(m)),
    "load_state_dict_post": lambda m, f: m.register_load_state_dict_post_hook(lambda m, k: f(m)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["layer", "mlp"])
def test_hooks_listen_to_what_took_the_modules_place(kind: str, where: str) -> None:
    """On a layer, and on an MLP that becomes a fused one: once a call, and removable by their old handles."""
    model = llama()
    name = "model.layers.0.mlp.up_proj" if where == "layer" else "model.layers.0.mlp"
    heard: list[nn.Module] = []

    def listen(module: nn.Module) -> None:
        heard.append(module)

    handle = HOOKS[kind](model.get_submodule(name), listen)

    def use() -> list[nn.Module]:
        heard.clear()
        model(torch.arange(12)[None]).logits.sum().backward()
        model.load_state_dict(model.state_dict())
        return list(heard)

    before = use()
    assert before
    for convert, type_ in ((lambda: sparsify(model, 0.5), (SparseLinear, FusedMLP)), (lambda: densify(model), None)):
        convert()
        assert use() == [model.get_submodule(name)] * len(before)
        assert type_ is None or isinstance(model.get_submodule(name), type_)
    sparsify(model, 0.5)
    handle.remove()
    assert not use()


def test_an_mlp_keeps_its_mode_and_attributes_while_it_is_fused() -> None:
    model = llama().eval()
    mlp = model.model.layers[0].mlp
    mlp.note = "mine"
    sparsify(model, 0.5)
    fused = model.model.layers[0].mlp
    assert isinstance(fused, FusedMLP)
    assert not any(module.training for module in model.modules())
    assert fused.note == "mine"
    assert fused.intermediate_size == 64
    fused.note = "changed"
    densify(model)
    assert model.model.layers[0].mlp is mlp
    assert mlp.note == "changed"
    assert not hasattr(mlp, "_original")


@pytest.mark.parametrize("patch", ["forward", "compile", "wrapped"])
def test_what_is_called_in_another_way_is_not_replaced(patch: str) -> None:
    """A call of the object would go on reaching what it was: an MLP keeps its place, a layer stays dense."""
    model = llama().eval()
    block = model.model.layers[0]
    for parent, name in ((block, "mlp"), (block.self_attn, "o_proj")):
        module, tokens = getattr(parent, name), torch.arange(12)[None]
        if patch == "forward":
            module.forward = module.forward
        elif patch == "compile":
            module.compile(backend="eager")
        else:
            setattr(parent, name, torch.compile(module, backend="eager"))
    with torch.no_grad():
        sparsify(model, 0.5)
        assert len(sparse_layers(model)) == 6
        assert not any(isinstance(module, FusedMLP) for module in model.modules())
        logits = model(tokens).logits
        torch.testing.assert_close(densify(model)(tokens).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_weights_gradient_is_refused_and_nothing_changes(register: str) -> None:
    model = chain()
    handle = getattr(model[2].weight, register)(lambda *a: None)
    with pytest.raises(InputError, match="layer 2 has a hook on its weight's gradient"):
        sparsify(model, 0.5)
    assert not sparse_layers(model)
    handle.remove()
    sparsify(model, 0.5)
    getattr(model[2].values, register)(lambda *a: None)
    with pytest.raises(InputError, match="layer 2 has a hook"):
        densify(model)
    assert len(sparse_layers(model)) == 2


def test_a_bias_keeps_its_identity_and_its_hooks() -> None:
    model = chain()
    bias, seen = model[2].bias, []
    bias.register_hook(seen.append)
    sparsify(model, 0.5)
    assert model[2].bias is bias
    model(torch.randn(4, 16)).sum().backward()
    assert len(seen) == 1
    assert densify(model)[2].bias is bias  # type: ignore[index]


def test_an_attribute_that_the_layer_needs_itself_is_refused() -> None:
    model = chain()
    model[0].unit = "px"
    with pytest.raises(InputError, match="layer 0 has an attribute 'unit'"):
        sparsify(model, 0.5)
    assert not sparse_layers(model)


def test_private_state_of_a_sparse_layer_is_made_when_it_is() -> None:
    """What a layer makes for itself later on would be taken for somebody's attribute and carried to a dense layer."""
    model = sparsify(chain(), 0.5)
    names = set(vars(model[0]))
    model(torch.randn(4, 16)).sum().backward()
    with torch.no_grad():
        model(torch.randn(4, 16))
    model.load_state_dict(model.state_dict())
    model[0].set_topology(model[0].topology, model[0].values.data)
    model.double()(torch.randn(4, 16, dtype=torch.float64))
    assert set(vars(model[0])) == names
    assert set(vars(densify(model)[0])) == set(vars(nn.Linear(1, 1)))  # type: ignore[index]


def test_a_model_is_gone_when_nobody_holds_it() -> None:
    """Without waiting for the garbage collector, which would keep a large model a while."""
    model = sparsify(gpt2(), 0.5)
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_layer_inside_a_layer_is_replaced_too_in_one_walk() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
    model[0].adapter = nn.Linear(8, 8)
    walks = 0
    own = model.named_modules

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal walks
        walks += 1
        return own(*given, **named)

    model.named_modules = counted  # type: ignore[method-assign]
    sparsify(model, 0.5)
    assert walks < 30
    assert isinstance(model[0].adapter, SparseLinear)
    walks = 0
    densify(model)
    assert walks < 30
    assert type(model[0].adapter) is nn.Linear
