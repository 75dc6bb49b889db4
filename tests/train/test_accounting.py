"""Counted operations against torch's own counter, and bytes against live tensors."""

from __future__ import annotations

import copy
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsae.config.load import resolve
from sparsae.config.schema import ModelConfig
from sparsae.core.accounting import (
    PARTS,
    FlopCounter,
    ModelCost,
    dense_state_bytes,
    estimated_state_bytes,
    gradient_at,
)
from sparsae.core.randomness import generator
from sparsae.models import build_model
from sparsae.nn.choice import linear_routers
from sparsae.nn.linear import sparse_layers
from sparsae.nn.routing import Routing
from sparsae.nn.sparsify import sparsify
from sparsae.optim import AdamW, parameter_groups
from sparsae.train.costs import RunCosts, model_cost
from sparsae.train.memory import state_bytes
from tests.support.architectures import ARCHITECTURES
from tests.support.versions import IS_OLD

VOCAB = 96
FAMILIES = [
    ModelConfig(family="gpt2", layers=2, heads=2, width=32, context=24),
    ModelConfig(family="gpt2", layers=1, heads=4, width=32, context=24, tie_embeddings=False),
    ModelConfig(family="llama", layers=2, heads=4, kv_heads=2, width=32, context=24),
    ModelConfig(family="llama", layers=1, heads=2, head_size=24, width=32, context=24),
]
COST = ModelCost(
    sparse_weights=1000, met_weights=1000, dense_weights=50, head_weights=300, attention_layers=2, width=8, context=16
)


def eager(config: ModelConfig) -> nn.Module:
    """With attention as plain products, which the counter sees, and without causal halving."""
    model = build_model(config, VOCAB, 0, device="cpu")
    model.set_attn_implementation("eager")
    return model


def rotary(model: nn.Module) -> int:
    """What an old torch counts of the angles of 24 positions, which are no product of the model's."""
    return 24 * model.config.head_dim if IS_OLD and hasattr(model.config, "head_dim") else 0  # type: ignore[union-attr]


@pytest.mark.parametrize("config", FAMILIES, ids=["gpt2", "gpt2-free-head", "llama", "llama-wide-heads"])
def test_forward_and_backward_agree_with_torchs_counter(config: ModelConfig) -> None:
    model, cost = eager(config), model_cost(eager(config), config)
    batch = torch.randint(0, VOCAB, (3, config.context), generator=generator(0))
    with FlopCounterMode(display=False) as forward:
        logits = model(batch, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    counted, tokens = forward.get_total_flops() - rotary(model), batch.numel()
    assert cost.forward(0, tokens) == counted
    assert cost.training(0, tokens) == counted + backward.get_total_flops()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "gpt_oss"])
def test_of_experts_those_count_that_a_token_is_sent_to(name: str) -> None:
    """Against torch's counter on the dense model, and by hand; what the others weigh is counted as memory."""
    model = ARCHITECTURES[name].build().float()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    own = model.config
    dimensions = {"layers": own.num_hidden_layers, "heads": own.num_attention_heads, "width": own.hidden_size}
    config = ModelConfig(
        family="llama", kv_heads=own.num_key_value_heads, head_size=own.head_dim, context=24, **dimensions
    )
    batch = torch.randint(0, own.vocab_size, (3, 24), generator=generator(0))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(batch, use_cache=False)
    dense = model_cost(model, config)
    assert dense.forward(0, batch.numel()) == forward.get_total_flops() - rotary(model)
    sparse = sparsify(copy.deepcopy(model), 0.75, seed=1)
    cost, layers = model_cost(sparse, config), sparse_layers(sparse)
    chosen, experts = own.num_experts_per_tok, 4
    assert cost.dense_training(7) == dense.training(0, 7)
    assert cost.sparse_weights == sum(math.prod(layer.topology.shape) for layer in layers.values())
    run = resolve(overrides=["model.layers=1"]).model_copy(update={"model": config})
    costs = RunCosts(sparse, run, None)
    assert costs.nnz == sum(layer.topology.nnz for layer in layers.values())
    by_hand = sum(
        Fraction(chosen, experts) * layer.topology.nnz if ".experts." in layer_name else layer.topology.nnz
        for layer_name, layer in layers.items()
    )
    assert costs.met == round(by_hand)
    assert costs.met < costs.nnz
    flops = FlopCounter()
    costs.count_step(flops, 7, 0, 0)
    assert flops.parts["student"] == cost.training(costs.met, 7)
    assert costs.share(next(name for name in layers if ".experts." in name)) == Fraction(chosen, experts)
    assert costs.share(next(name for name in layers if ".experts." not in name)) == 1


class Mixture(nn.Module):
    """Experts as people write them: a list of modules, and a linear router."""

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, experts
        self.gate = nn.Linear(8, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(experts)
        )


def test_experts_in_a_list_count_as_well() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Mixture(4, 1), nn.ModuleList(nn.Linear(8, 8) for _ in range(4)))
    routing = Routing(model)
    assert routing.shares == {"1.experts": Fraction(1, 4)}
    assert routing.met({"0": 64, "1.experts.0.0": 100, "1.experts.3.2": 60}) == 64 + 40
    assert list(linear_routers(model)) == ["1.gate"]


def test_a_sparse_model_costs_its_active_weights_and_its_dense_equivalent_all() -> None:
    config = FAMILIES[0]
    dense, sparse = model_cost(eager(config), config), model_cost(sparsify(eager(config), 0.75), config)
    assert dense.sparse_weights == sparse.dense_weights == 0
    assert sparse.sparse_weights == dense.dense_weights
    assert sparse.head_weights == dense.head_weights == VOCAB * config.width
    assert sparse.dense_training(40) == dense.training(0, 40)
    assert dense.training(0, 40) - sparse.training(sparse.sparse_weights // 4, 40) == 3 * 2 * 40 * (
        sparse.sparse_weights * 3 // 4
    )


@given(st.integers(0, 1000), st.integers(1, 10_000))
def test_the_parts_of_a_pass_add_up(nnz: int, tokens: int) -> None:
    assert COST.linear(nnz, tokens) == 2 * tokens * (nnz + 350)
    assert COST.attention(tokens) == 4 * 16 * 8 * 2 * tokens
    assert COST.forward(nnz, tokens) == COST.linear(nnz, tokens) + COST.attention(tokens)
    assert COST.training(nnz, tokens) == 3 * COST.forward(nnz, tokens)
    assert COST.scoring(nnz, tokens, with_gradient=False) == COST.forward(nnz, tokens)
    # Everything but the gradients of dense weights and of the head.
    assert COST.training(nnz, tokens) - COST.scoring(nnz, tokens, with_gradient=True) == 2 * tokens * 350


def test_a_gradient_everywhere_costs_a_dense_product() -> None:
    assert gradient_at(64 * 32, 10) == 2 * 64 * 32 * 10
    assert gradient_at(5, 10) == 100


def test_the_counter_adds_exactly_and_survives_a_checkpoint() -> None:
    flops = FlopCounter()
    for part, amount in zip(PARTS, (10**19, 3, 2**70, 1), strict=True):
        flops.add(part, amount)
        flops.add(part, amount)
    flops.dense_equivalent = 10**21
    assert flops.total == 2 * (10**19 + 3 + 2**70 + 1)
    restored = FlopCounter.from_dict(json.loads(json.dumps(flops.to_dict())))
    assert restored == flops
    restored.add("search", 1)
    assert restored.total == flops.total + 1


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(ValueError, match=r"'optimizer'.*student, teacher, search, dense_gradients"):
        FlopCounter().add("optimizer", 1)


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_estimated_bytes_are_those_of_live_tensors(unit: tuple[int, int]) -> None:
    config = FAMILIES[0]
    model = sparsify(eager(config), 0.9, unit=unit, backend="reference")
    optimizer = AdamW(parameter_groups(model, 0.1))
    model(torch.zeros(1, 8, dtype=torch.long)).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    layers = sparse_layers(model)
    units = sum(layer.topology.count for layer in layers.values())
    nnz = sum(layer.topology.nnz for layer in layers.values())
    live = state_bytes(layers, optimizer, None)
    assert estimated_state_bytes(nnz, 2 * 4 * units) == {name: live.get(name, 0) for name in live}


def test_at_ninety_percent_the_state_is_a_sixth_of_a_dense_models() -> None:
    parts = estimated_state_bytes(100, 800, teacher_weights=100)
    assert parts["teacher"] == 400
    assert sum(parts.values()) / dense_state_bytes(1000, teacher=True) == pytest.approx(0.16)
    without = estimated_state_bytes(100, 800)
    assert without["teacher"] == 0
    assert sum(without.values()) / dense_state_bytes(1000, teacher=False) == pytest.approx(0.175)
