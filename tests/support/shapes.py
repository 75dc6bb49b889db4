"""Models of other libraries, and modules shaped like theirs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)


def gpt2(vocabulary: int = 50) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=None,
    )
    return MixtralForCausalLM(config)


def falcon() -> FalconForCausalLM:
    return FalconForCausalLM(
        FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=None)
    )


class ResNet(nn.Module):
    """timm's and torchvision's shape of a network: convolutions, and `fc` for the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64))
        self.squeeze = nn.Linear(64, 8)
        self.fc = nn.Linear(64, 10)


class Stacked(nn.Module):
    """Somebody's experts: nothing tells how they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 32, 32))
        self.linear = nn.Linear(32, 32)


class Held(nn.Module):
    """As Lightning's modules hold a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Block(nn.Module):
    """A hidden layer that is called as a last one is."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.fc = nn.Linear(32, 32), nn.Linear(32, 32)


class LitGPT(nn.Module):
    """litgpt's: the head is registered before everything else, and a gate stands beside its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_expert=4)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(64, 32), "h": nn.ModuleList([MoE(4), MoE(4)])})


class MoE(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(32, experts)
        self.experts = nn.ModuleList(GLU() for _ in range(experts))


class GLU(nn.Module):
    """A `gate` that is no router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.router = nn.ModuleDict({"classifier": nn.Linear(32, 3)})
        self.wi = nn.Linear(32, 32)


class XTransformer(nn.Module):
    """x-transformers': a head called `to_logits`, and another layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(64, 32)
        self.attn = nn.Linear(32, 32)
        self.to_logits = nn.Linear(32, 64)
        self.memory = nn.Linear(32, 32)


class Timm(nn.Module):
    """Two heads, which a method tells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.out_a, self.out_b = nn.Linear(32, 10), nn.Linear(32, 10)

    def get_classifier(self) -> Any:
        return self.out_a, self.out_b


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm = gpt2()
        self.value = nn.Linear(32, 32)


def vgg() -> nn.Module:
    classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Module()
    model.features, model.classifier = nn.Sequential(nn.Conv2d(3, 8, 3)), classifier
    return model
