"""Decoding a token at a time: the fast path against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from sparsae.core.randomness import generator
from sparsae.evaluate.decoding import Blocks, Decoder, FastDecoder, ModelDecoder, _token_block, open_decoder
from sparsae.families import FAMILIES
from sparsae.kernels.cpu import native
from sparsae.kernels.registry import BACKENDS
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


def qwen3() -> nn.Module:
    config = Qwen3Config(
        vocab_size=60,
        max_position_embeddings=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        **IDS,
    )
    return AutoModelForCausalLM.from_config(config)


MODELS = {
    "gpt2": gpt2,
    "gpt2, head of its own": lambda: gpt2(tie_word_embeddings=False, activation_function="relu"),
    "llama, grouped heads": llama,
    "qwen3, head norms": qwen3,
    "llama, biases": lambda: llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
}


def prepared(name: str, sparsity: float, seed: int = 0, unit: tuple[int, int] = (1, 1)) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator(seed, str(parameter.shape)))
    if sparsity:
        sparsify(model, sparsity, seed=seed, unit=unit, sparsify_head="own" in name)
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
    # All blocks in one call, unless a layer is denser than what the kernels pay for.
    assert sparsity == 0.5 or (fast._at_once is not None) == (sparsity > 0 and native.absence() is None)
    tokens = torch.randint(60, (24,), generator=generator(1, "tokens")).tolist()
    whole = model(input_ids=torch.tensor([tokens])).logits[0]
    for prompt in (1, 9):  # the second reading forgets the first
        got = decoded(fast, tokens, prompt)
        torch.testing.assert_close(got, decoded(ModelDecoder(model), tokens, prompt), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, whole[prompt - 1 :], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.absence() is not None, reason="the native kernels were not compiled")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
def test_one_call_is_what_a_call_for_each_part_is(isa: str) -> None:
    """With every instruction set, blocks of weights, head norms, and heads that fill no vector."""
    before = native.isa()
    if not native.select_isa(isa):
        pytest.skip("this machine does not have it")
    try:
        for name, unit in (("llama, grouped heads", (1, 1)), ("qwen3, head norms", (1, 1)), ("gpt2", (4, 4))):
            model = prepared(name, 0.8, unit=unit)
            whole, parts = open_decoder(model, 24), open_decoder(model, 24)
            assert isinstance(whole, FastDecoder)
            assert isinstance(parts, FastDecoder)
            assert whole._at_once is not None
            parts._at_once = None
            tokens = torch.randint(60, (24,), generator=generator(1, "tokens")).tolist()
            torch.testing.assert_close(decoded(whole, tokens, 1), decoded(parts, tokens, 1), rtol=1e-5, atol=1e-5)
    finally:
        native.select_isa(before)


def test_the_number_of_threads_changes_no_bit() -> None:
    model, tokens = prepared("gpt2", 0.8), list(range(24))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(decoded(open_decoder(model, 24), tokens, 1))
    assert torch.equal(*found)


def test_a_layer_that_stays_dense_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = sparsify(gpt2(), 0.9, exclude=["*.0.attn.c_proj"]).eval().requires_grad_(False)
    fast, tokens = open_decoder(model, 24), [5, 3, 8, 1]
    assert isinstance(fast, FastDecoder)
    assert fast._at_once is None
    torch.testing.assert_close(decoded(fast, tokens, 1), decoded(ModelDecoder(model), tokens, 1), rtol=1e-4, atol=1e-4)


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
    assert isinstance(open_decoder(gpt2().eval().transformer, 24), ModelDecoder)  # of no head
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert isinstance(open_decoder(llama(rope_parameters=dynamic).eval(), 24), ModelDecoder)
    wrapped = prepared("gpt2", 0.0)
    wrapped.transformer.h[0].mlp = Wrapper(wrapped.transformer.h[0].mlp)
    assert isinstance(open_decoder(wrapped, 24), ModelDecoder)
    listened = prepared("gpt2", 0.5)
    listened.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    assert isinstance(open_decoder(listened, 24), ModelDecoder)


@pytest.mark.parametrize("widths", [(32, 2048), (2048, 32)])
def test_blocks_with_mlps_of_other_widths_are_decoded_too(widths: tuple[int, int]) -> None:
    model = gpt2()
    for block, width in zip(model.get_submodule("transformer.h").children(), widths, strict=True):
        block.mlp = GPT2MLP(width, model.config)
    sparsify(model, 0.9, budget="uniform").eval().requires_grad_(False)
    fast, tokens = open_decoder(model, 24), [5, 3, 8, 1]
    assert isinstance(fast, FastDecoder)
    torch.testing.assert_close(decoded(fast, tokens, 1), decoded(ModelDecoder(model), tokens, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.absence() is not None, reason="the native kernels were not compiled")
def test_a_weight_that_does_not_fit_the_others_is_no_weight_of_a_block() -> None:
    model = prepared("gpt2", 0.9)
    blocks = Blocks(model, FAMILIES["gpt2"], 24)
    cache = torch.zeros(2, 2, 1, 4, 24, 8)
    given = [_token_block(module, blocks.family, 1.0) for module in blocks.modules]
    assert given[0] is not None
    wrong = given[0]._replace(down=given[0].up)
    with pytest.raises(ValueError, match="a weight is 128x32 where 32x128 fits"):
        BACKENDS["cpu"].token_blocks([wrong], blocks.shape(24), cache)


class Tripled(nn.Embedding):
    """An embedding with a forward pass of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class Halved(GPT2Attention):
    """Likewise, of all that attention gives."""

    def forward(self, *args: Any, **others: Any) -> Any:
        y, *rest = super().forward(*args, **others)
        return (y / 2, *rest)


def test_a_model_with_a_part_of_somebody_elses_goes_its_own_way() -> None:
    for place, of in (("transformer.wte", Tripled), ("transformer.h.1.attn", Halved)):
        model = prepared("gpt2", 0.9)
        model.get_submodule(place).__class__ = of
        assert isinstance(open_decoder(model, 24), ModelDecoder)
    for place, part in (("transformer.h.0.ln_1", nn.Identity()), ("transformer.h.1", nn.Identity())):
        model = prepared("gpt2", 0.9)
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, part)
        assert isinstance(open_decoder(model, 24), ModelDecoder)


class Own(GPT2LMHeadModel):
    """A class of somebody else's that computes as what it inherits from."""


class Doubled(GPT2LMHeadModel):
    """And one that does not."""

    def forward(self, *args: Any, **others: Any) -> Any:
        return super().forward(*args, **others)


@pytest.mark.parametrize(("kind", "decoder"), [(Own, FastDecoder), (Doubled, ModelDecoder)])
def test_a_class_of_somebody_elses_is_known_by_its_forward_pass(kind: type[nn.Module], decoder: type[Decoder]) -> None:
    model = prepared("gpt2", 0.9)
    kind.__name__ = "GPT2LMHeadModel"
    model.__class__ = kind
    assert isinstance(open_decoder(model, 24), decoder)


def test_results_do_not_share_memory() -> None:
    decoder = open_decoder(prepared("gpt2, head of its own", 0.9), 24)
    first = decoder.read([1, 2])
    kept = first.clone()
    second = decoder.step(3)
    decoder.step(4)
    assert torch.equal(first, kept)
    assert not torch.equal(second, kept)
