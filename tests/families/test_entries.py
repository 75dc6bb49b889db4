"""What model.transformers may say: entries of the family's configuration that shape its model, with values of use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from sparsae.config import ModelConfig
from sparsae.errors import InputError
from sparsae.families import FAMILIES
from sparsae.models import build_model, further_entries

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"activation_function": "rely"}, r"activation_function: no activation function 'rely'; did you mean relu"),
    ("gpt2", {"activation_function": 5}, r"activation_function: transformers cannot use 5: .*expected str, got int"),
    ("gpt2", {"layer_norm_epsilon": "abc"}, r"layer_norm_epsilon: transformers cannot use 'abc': .*expected float"),
    ("gpt2", {"layer_norm_epsilon": -1}, r"layer_norm_epsilon: must be above 0, not -1"),
    ("llama", {"attention_dropout": 1.0}, r"attention_dropout: must be at least 0 and below 1, not 1\.0"),
    ("llama", {"attention_dropout": None}, r"attention_dropout: must be at least 0 and below 1, not null"),
    ("llama", {"hidden_act": "foo"}, r"hidden_act: no activation function 'foo'; one of: "),
    ("llama", {"rope_parameters": 5}, r"rope_parameters: transformers cannot use 5: "),
    ("llama", {"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, r"rope_parameters: .* it knows no 'foo'"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 0.0}},
        r"rope_parameters: .*'rope_theta': 0\.0}: rope_theta must be abo",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 0.0}},
        r"rope_parameters: .*: factor must be above",
    ),
    (
        "llama",
        {"rope_theta": 5e5},
        r"rope_theta: family llama has no such entry to set; it belongs into rope_parameters",
    ),
    ("llama", {"rope_scaling": {"factor": 2.0}}, r"rope_scaling: .* it belongs into rope_parameters"),
    ("gpt2", {"rope_theta": 5e5}, r"rope_theta: family gpt2 has no such entry to set; one of: activation_function, "),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"]},
        r"layer_types: .*: layers of sliding_attention want a sliding_wi",
    ),
    ("llama", {"mlp_bias": True, "rms_norm_eps": "x"}, r"rms_norm_eps: transformers cannot use 'x': "),
    ("gpt2", {"rms_norm_eps": 1.0}, r"rms_norm_eps: family gpt2 has no such entry to set; did you mean layer_norm_eps"),
    ("gpt2", {"hidden_size": 64}, r"hidden_size: family gpt2 has no such entry to set; one of: activation_function, "),
]


@pytest.mark.parametrize(("family", "entries", "line"), WRONG, ids=str)
def test_what_transformers_cannot_use_is_one_line(family: str, entries: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.transformers\.{line}") as caught:
        build_model(ModelConfig(family=family, layers=1, width=32, heads=2, context=16, transformers=entries), 50, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [0, -4, None])
def test_sliding_layers_want_a_window(window: int | None) -> None:
    entries = {"use_sliding_window": True, "layer_types": ["sliding_attention"], "sliding_window": window}
    with pytest.raises(InputError, match=r"^model\.transformers.*: layers of sliding_attention want a sliding_window"):
        build_model(ModelConfig(family="qwen3", layers=1, width=32, heads=2, context=16, transformers=entries), 50, 0)


def test_settings_stay_as_they_are_when_a_model_is_made_of_them() -> None:
    entries: dict[str, Any] = {"rope_parameters": {"rope_theta": 500.0}}
    config = ModelConfig(family="llama", layers=1, width=32, heads=2, context=16, transformers=entries)
    build_model(config, 50, 0)
    assert config.transformers == {"rope_parameters": {"rope_theta": 500.0}}


def test_of_several_entries_the_one_at_fault_is_told() -> None:
    window = {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}
    line = r"^model\.transformers\.layer_types: transformers cannot use \['full_attention', .*\]: `num_hidden_layers`"
    with pytest.raises(InputError, match=line):
        build_model(ModelConfig(family="qwen3", layers=2, width=32, heads=2, context=16, transformers=window), 50, 0)


@pytest.mark.parametrize("family", FAMILIES.own_names())
def test_what_the_program_decides_is_not_to_be_set(family: str) -> None:
    free = further_entries(FAMILIES[family])
    assert free.isdisjoint(FAMILIES[family].settings)
    assert free.isdisjoint({field for field in vars(PreTrainedConfig()) if field not in FAMILIES[family].constants})
    for name in ("dtype", "attn_implementation", "output_attentions", "return_dict", "use_cache", "pretraining_tp"):
        assert name not in free
    for name in ("reorder_and_upcast_attn", "add_cross_attention", "summary_type", "eos_token_id", "vocab_size"):
        assert name not in free
    assert free & {"layer_norm_epsilon", "rms_norm_eps"}


def test_a_configuration_with_an_init_of_its_own_has_its_parameters() -> None:
    class Guest(PreTrainedConfig):
        model_type = "guest_of_entries"

        def __init__(self, widening: int = 4, **kwargs: Any) -> None:
            self.widening = widening
            super().__init__(**kwargs)

    AutoConfig.register("guest_of_entries", Guest)
    assert further_entries(replace(FAMILIES["llama"], model_type="guest_of_entries")) == {"widening"}
