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
    ("llama", {"hidden_act": "foo"}, r"hidden_act: no activation function 'foo'; one of: "),
    ("llama", {"rope_parameters": 5}, r"rope_parameters: transformers cannot use 5: "),
    ("llama", {"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, r"rope_parameters: .* it knows no 'foo'"),
    ("llama", {"mlp_bias": True, "rms_norm_eps": "x"}, r"rms_norm_eps: transformers cannot use 'x': "),
    ("gpt2", {"rms_norm_eps": 1.0}, r"rms_norm_eps: family gpt2 has no such entry to set; did you mean layer_norm_eps"),
    ("gpt2", {"hidden_size": 64}, r"hidden_size: family gpt2 has no such entry to set; one of: activation_function, "),
]


@pytest.mark.parametrize(("family", "entries", "line"), WRONG, ids=str)
def test_what_transformers_cannot_use_is_one_line(family: str, entries: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.transformers\.{line}") as caught:
        build_model(ModelConfig(family=family, layers=1, width=32, heads=2, context=16, transformers=entries), 50, 0)
    assert "\n" not in str(caught.value)


def test_of_several_entries_the_one_at_fault_is_told() -> None:
    window = {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}
    with pytest.raises(InputError, match=r"^model\.transformers\.layer_types: transformers cannot use \['full_att"):
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
