"""Tiny models of 30 architectures of transformers, from configurations alone, and batches to train them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparsify
from sparsae.nn.linear import sparse_layers
from sparsae.rules import EvolutionConfig, RiglConfig

RULES: dict[str, Any] = {"rigl": RiglConfig(every=5), "evolution": EvolutionConfig(every=5, proposer="guided")}
VOCABULARY, LENGTH = 48, 8
Batch = Callable[[torch.Generator], dict[str, Tensor]]

# The same for all that have them: no token is special, and nothing is drawn but the initial weights.
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "head_dim": 8}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
BERT = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def text(rng: torch.Generator) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=rng)
    return {"input_ids": tokens, "labels": tokens}


def image(rng: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=rng), "labels": torch.tensor([0, 1])}


def sound(rng: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 16, generator=rng), "labels": text(rng)["labels"]}


def pair(rng: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_ids": text(rng)["input_ids"],
        "pixel_values": image(rng)["pixel_values"],
        "return_loss": torch.tensor(True),
    }


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, its configuration and what it reads.

    refusal: why it cannot be made sparse. checkpointing: whether the class has activation checkpointing.
    """

    model: str
    config: type
    settings: dict[str, Any]
    batch: Batch = text
    refusal: str | None = None
    checkpointing: bool = True

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(hf, self.model)(self.config(**self.settings))
        return model.train()


def train_sparse(
    architecture: Architecture, rule: str, steps: int = 20, checkpointing: bool = False
) -> tuple[nn.Module, list[float]]:
    """A sparse model after `steps` steps with moving connections, and its losses; nnz is checked at every step."""
    model, rng = architecture.build(), torch.Generator().manual_seed(0)
    sparsify(model, 0.7)
    layers = sparse_layers(model)
    nnz = round(0.3 * sum(layer.topology.units for layer in layers.values()))
    before = {name: layer.dense_weight() for name, layer in layers.items()}
    if checkpointing:
        # Called by its older name in transformers that do not have the new one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()  # type: ignore[operator]
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=2 * steps, topology=RULES[rule]))
    losses, accepted = [], 0
    for _ in range(steps):
        loss = model(**architecture.batch(rng)).loss
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        update = sparsifier.after_step()
        optimizer.zero_grad()
        accepted += update is not None and update.accepted
        losses.append(float(loss.detach()))
        assert sparsifier.nnz == nnz == sum(layer.values.numel() for layer in layers.values())
    assert accepted == steps // 5
    assert all(not torch.equal(layer.dense_weight(), before[name]) for name, layer in layers.items())
    return model, losses


ARCHITECTURES = {
    "GPT-2": Architecture("GPT2LMHeadModel", hf.GPT2Config, GPT),
    "Llama": Architecture("LlamaForCausalLM", hf.LlamaConfig, LLAMA),
    "Mistral": Architecture("MistralForCausalLM", hf.MistralConfig, LLAMA),
    "Mixtral": Architecture("MixtralForCausalLM", hf.MixtralConfig, EXPERTS | {"num_local_experts": 4}),
    "Qwen2": Architecture("Qwen2ForCausalLM", hf.Qwen2Config, LLAMA),
    "Qwen3": Architecture("Qwen3ForCausalLM", hf.Qwen3Config, LLAMA | {"head_dim": 8}),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM", hf.Qwen3MoeConfig, EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16}
    ),
    "gpt_oss": Architecture("GptOssForCausalLM", hf.GptOssConfig, EXPERTS | {"num_local_experts": 4}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", hf.Gemma2Config, LLAMA | {"head_dim": 8}),
    "Phi-3": Architecture("Phi3ForCausalLM", hf.Phi3Config, LLAMA),
    "OLMo 2": Architecture("Olmo2ForCausalLM", hf.Olmo2Config, LLAMA),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", hf.GPTNeoXConfig, BERT),
    "GPT-J": Architecture("GPTJForCausalLM", hf.GPTJConfig, GPT | {"rotary_dim": 4}),
    "OPT": Architecture("OPTForCausalLM", hf.OPTConfig, BERT | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BLOOM": Architecture("BloomForCausalLM", hf.BloomConfig, TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": Architecture(
        "FalconForCausalLM",
        hf.FalconConfig,
        TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        refusal=r"8 a subclass of nn\.Linear with a forward of its own \(FalconLinear\)",
    ),
    "BERT": Architecture("BertForMaskedLM", hf.BertConfig, BERT),
    "RoBERTa": Architecture("RobertaForMaskedLM", hf.RobertaConfig, BERT),
    "DistilBERT": Architecture(
        "DistilBertForMaskedLM",
        hf.DistilBertConfig,
        TOKENS | {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "ALBERT": Architecture("AlbertForMaskedLM", hf.AlbertConfig, BERT | {"embedding_size": 16}, checkpointing=False),
    "ELECTRA": Architecture("ElectraForMaskedLM", hf.ElectraConfig, BERT | {"embedding_size": 16}),
    "DeBERTa-v2": Architecture(
        "DebertaV2ForMaskedLM",
        hf.DebertaV2Config,
        BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        hf.T5Config,
        TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "BART": Architecture(
        "BartForConditionalGeneration",
        hf.BartConfig,
        TOKENS
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 32,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "Mamba": Architecture(
        "MambaForCausalLM", hf.MambaConfig, TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    ),
    "Mamba 2": Architecture(
        "Mamba2ForCausalLM",
        hf.Mamba2Config,
        TOKENS
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "RWKV": Architecture(
        "RwkvForCausalLM", hf.RwkvConfig, TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 32}
    ),
    "ViT": Architecture("ViTForImageClassification", hf.ViTConfig, VISION | {"num_labels": 2}, image),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        hf.WhisperConfig,
        TOKENS
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        sound,
    ),
    "CLIP": Architecture(
        "CLIPModel", hf.CLIPConfig, {"text_config": BERT, "vision_config": VISION, "projection_dim": 16}, pair
    ),
}
