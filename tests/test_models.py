"""Models from configurations: built without storage, initialized as transformers does, saved and loaded."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsae.config import ModelConfig, ParameterizationConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.models import attention_heads, build_model, decoder_and_head, hidden_states, materialize, parameterized
from sparsae.nn.choice import layer_shapes, linear_layers
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.parameterization import Parameterization

VOCAB, EOS, CPU = 300, 7, torch.device("cpu")
CONFIGS = [
    ModelConfig(family="gpt2", layers=2, heads=2, width=64, context=16),
    ModelConfig(family="gpt2", layers=3, heads=4, width=64, context=16, tie_embeddings=False),
    ModelConfig(family="llama", layers=2, heads=4, kv_heads=2, width=64, context=16),
    ModelConfig(family="llama", layers=3, heads=2, width=64, context=16, tie_embeddings=False),
]
every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.family}-{'tied' if c.tie_embeddings else 'free'}"
)


def make(config: ModelConfig, seed: int = 0) -> Any:
    model = build_model(config, VOCAB, EOS)
    materialize(model, standard(config), seed, CPU)
    return model.eval()


def standard(config: ModelConfig) -> Parameterization:
    return parameterized(config, ParameterizationConfig())


def tokens(config: ModelConfig, sequences: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, config.context), generator=generator(0, "tokens"))


@every_config
def test_on_the_meta_device_no_weight_exists(config: ModelConfig) -> None:
    model = build_model(config, VOCAB, EOS)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


@every_config
def test_everything_starts_as_in_transformers(config: ModelConfig) -> None:
    torch.manual_seed(0)
    ours, theirs = make(config), build_model(config, VOCAB, EOS, device="cpu")
    expected = dict(theirs.named_parameters())
    assert list(dict(ours.named_parameters())) == list(expected)
    for name, parameter in ours.named_parameters():
        other = expected[name]
        assert (parameter.shape, parameter.dtype, parameter.requires_grad) == (other.shape, other.dtype, True), name
        if other.unique().numel() == 1:  # norms and biases
            assert torch.equal(parameter, other), name
        else:
            std, noise = other.std().item(), 5 / other.numel() ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=2 * noise), name
            assert abs(parameter.mean().item()) < noise * std, name
            # Normal, not uniform: about 4.6 % lie beyond two deviations, where a uniform distribution has none.
            assert (parameter.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=0.02), name


@every_config
def test_buffers_are_those_of_transformers(config: ModelConfig) -> None:
    ours, theirs = make(config), build_model(config, VOCAB, EOS, device="cpu")
    assert list(dict(ours.named_buffers())) == list(dict(theirs.named_buffers()))
    assert len(list(ours.buffers())) == (2 if config.family == "llama" else 0)
    for (name, got), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=name)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@every_config
def test_logits_are_finite_and_those_of_head_and_hidden_states(config: ModelConfig) -> None:
    model, batch = make(config), tokens(config)
    decoder, head = decoder_and_head(model)
    with torch.no_grad():
        hidden = hidden_states(decoder, batch)
        logits = model(batch).logits
    assert hidden.shape == (batch.numel(), config.width)
    assert logits.isfinite().all()
    torch.testing.assert_close(head(hidden).view_as(logits), logits)


@every_config
def test_tied_weights_are_one_tensor(config: ModelConfig) -> None:
    model = make(config)
    embedding, head = model.get_input_embeddings(), decoder_and_head(model)[1]
    assert (embedding.weight is head.weight) == config.tie_embeddings
    if not config.tie_embeddings:
        assert not torch.equal(embedding.weight, head.weight)


@every_config
def test_it_comes_back_from_disk(config: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, batch = make(config), tokens(config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).logits, model(batch).logits, rtol=0, atol=0)


def test_a_weight_depends_on_the_seed_and_its_name_and_on_nothing_else() -> None:
    small, large = CONFIGS[0], CONFIGS[0].model_copy(update={"layers": 4, "tie_embeddings": False, "context": 32})
    same = dict(make(small).named_parameters())
    for name, parameter in make(large).named_parameters():
        if name in same and not name.endswith(("c_proj.weight", "wpe.weight")):
            assert torch.equal(parameter, same[name]), name
    assert all(torch.equal(p, same[name]) for name, p in make(small).named_parameters())
    other = dict(make(small, seed=1).named_parameters())
    first = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(other[first], same[first])
    assert not torch.equal(same[first.replace("h.0", "h.1")], same[first])


def test_what_exists_already_stays() -> None:
    config = CONFIGS[0]
    model = build_model(config, VOCAB, EOS)
    sparsify(model, 0.9, initializer=lambda name, topology, rng: torch.full(topology.values_shape, 3.0))
    dense_weights = sum(p.numel() for p in model.parameters() if p.is_meta)
    materialize(model, standard(config), 0, CPU)
    assert not any(p.is_meta for p in model.parameters())
    assert all((layer.values == 3.0).all() for layer in sparse_layers(model).values())
    # Embeddings, norms and biases were allocated, and no matrix of a sparse layer.
    unsparse = build_model(config, VOCAB, EOS)
    matrices = sum(module.weight.numel() for module in linear_layers(unsparse).values())  # type: ignore[union-attr,operator]
    assert dense_weights == sum(p.numel() for p in unsparse.parameters()) - matrices


@every_config
def test_initial_std_is_that_of_transformers_dense_layers(config: ModelConfig) -> None:
    torch.manual_seed(0)
    layers = linear_layers(build_model(config, VOCAB, EOS, device="cpu"))
    assert len(layers) == config.layers * (4 if config.family == "gpt2" else 7)
    for name, layer in layers.items():
        assert isinstance(layer.weight, Tensor)
        expected = standard(config).initial_std(standard(config).role(name))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.06), name


@every_config
def test_heads_divide_the_attention_layers_and_no_other(config: ModelConfig) -> None:
    shapes = layer_shapes(linear_layers(build_model(config, VOCAB, EOS)))
    found = {
        name: layout.groups(rows, columns)
        for name, (rows, columns) in shapes.items()
        for pattern, layout in attention_heads(config).items()
        if fnmatchcase(name, pattern)
    }
    heads, kv = config.heads, config.kv_heads or config.heads
    if config.family == "gpt2":
        block = {"attn.c_attn": 3 * heads, "attn.c_proj": heads}
        prefix = "transformer.h"
    else:
        block = {f"self_attn.{name}_proj": n for name, n in {"q": heads, "k": kv, "v": kv, "o": heads}.items()}
        prefix = "model.layers"
    assert found == {f"{prefix}.{i}.{name}": n for i in range(config.layers) for name, n in block.items()}


def test_a_head_layout_that_does_not_divide_is_an_error() -> None:
    assert HeadLayout("in", 4).groups(6, 12) == 3
    with pytest.raises(InputError, match="4 features do not divide 6"):
        HeadLayout("out", 4).groups(6, 12)


@every_config
def test_the_configuration_says_what_was_asked(config: ModelConfig) -> None:
    model = build_model(config, VOCAB, EOS)
    settings = model.config
    assert (settings.vocab_size, settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (
        VOCAB, EOS, EOS, None,
    )  # fmt: skip
    assert settings._attn_implementation == "sparsae"
    assert settings.max_position_embeddings == config.context
    assert settings.tie_word_embeddings == config.tie_embeddings
    shapes = layer_shapes(linear_layers(model))
    mlp = next(shape for name, shape in shapes.items() if name.endswith(("c_fc", "up_proj")))
    assert mlp[0] == (256 if config.family == "gpt2" else 192)


def test_dropout_is_everywhere_in_gpt2() -> None:
    model = build_model(CONFIGS[0].model_copy(update={"dropout": 0.25}), VOCAB, EOS)
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates
    assert set(rates) == {0.25}


def test_the_narrowest_llama_still_has_an_mlp() -> None:
    config = ModelConfig(family="llama", layers=1, heads=1, width=4, context=8)
    assert make(config).config.intermediate_size == 64


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller() -> None:
    larger = CONFIGS[0].model_copy(update={"vocab_size": 320})
    assert build_model(larger, VOCAB, EOS).get_input_embeddings().weight.shape[0] == 320
    with pytest.raises(InputError, match=r"model\.vocab_size is 256.*300 entries"):
        build_model(CONFIGS[0].model_copy(update={"vocab_size": 256}), VOCAB, EOS)
