"""What a run would be, before it is one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from sparsae.config.schema import Config
from sparsae.core.accounting import DENSE_BYTES_PER_WEIGHT, FlopCounter, estimated_state_bytes
from sparsae.core.randomness import generator
from sparsae.data import load_tokenizer
from sparsae.distill import WarmUp
from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import choose_backend
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.rules import build_rule
from sparsae.train.build import build, check, choose_device
from sparsae.train.costs import RunCosts
from sparsae.train.search import SearchCost


def plan(config: Config) -> dict[str, Any]:
    """What a run would be, without data, weights or a directory: layers, operations, bytes and an expected time.

    Operations assume that lambda stays and no candidate is rejected, and that the warm-up of the teacher is by
    fraction. The time is that of the dense products of all parts at the rate of a short measurement on this machine.
    """
    check(config)
    vocab_size = config.data.tokenizer_vocab
    if config.data.tokenizer != "train":
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    model = build(config, vocab_size, 0, torch.device("meta"))
    layers = sparse_layers(model)
    rule = build_rule(config.topology)
    costs = RunCosts(model, config, rule.micro_batch)
    training = config.training
    tokens = training.batch_size * training.accumulation * config.model.context
    weights, nnz = costs.cost.sparse_weights, costs.nnz
    flops, dense = FlopCounter(), FlopCounter()
    warmup = WarmUp(config.teacher, training.steps)
    for step in range(training.steps):
        taught = config.teacher.enabled and warmup.alpha(step) > 0
        teacher_nnz = weights if config.teacher.storage == "dense" else nnz
        costs.count_step(flops, tokens, teacher_nnz if taught else None)
        costs.count_step(dense, tokens, weights if taught else None)
    updates = sum(rule.due(step, training.steps) for step in range(1, training.steps + 1))
    scored = 1 + rule.initial_state().candidates if rule.micro_batch else 0
    probed = {}
    if "gradient_at" in rule.needs:
        sample = rule.sample(
            {name: layer.topology for name, layer in layers.items()}, rule.initial_state(), generator(0, "plan")
        )
        b_out, b_in = config.sparsity.unit
        probed = {name: (units.numel() * b_out * b_in, tokens) for name, units in sample.items()}
    backwards = scored if "candidate_gradient" in rule.needs else 0
    for _ in range(updates):
        costs.count_update(flops, SearchCost(scored, backwards, probed))
    units = sum(layer.topology.count for layer in layers.values())
    teacher = config.teacher.storage if config.teacher.enabled else None
    dense_parameters = sum(p.numel() for p in model.parameters()) - nnz + weights
    state = estimated_state_bytes(units, nnz, weights, teacher=teacher) | {"indices": _index_bytes(config, layers)}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_dense": dense_parameters,
        "layers": [
            {
                "name": name,
                "out": layer.out_features,
                "in": layer.in_features,
                "nnz": layer.topology.nnz,
                "density": layer.topology.density,
            }
            for name, layer in layers.items()
        ],
        "train_flops_per_step": costs.cost.training(nnz, tokens),
        "train_flops": dict(flops.parts),
        "train_flops_dense_equivalent": flops.dense_equivalent,
        "state_bytes": state,
        "state_bytes_dense_equivalent": DENSE_BYTES_PER_WEIGHT * weights,
        # As if all arithmetic were dense: what the reference backend needs, and more than the native kernels do.
        "expected_seconds": (dense.total + flops.parts["search"] * weights / max(1, nnz))
        / _measured_flops_per_second(config),
        "steps": training.steps,
        "tokens": training.steps * tokens,
    }


def _index_bytes(config: Config, layers: Mapping[str, SparseLinear]) -> int:
    """Bytes of indices, and of what the backends that will serve the layers keep beside them."""
    total = 0
    for layer in layers.values():
        topology = layer.topology
        total += topology.indices.nbytes
        if choose_device(config.training.device).type == "cpu":
            layout = Layout(topology.shape, topology.unit, topology.indices)
            backend = choose_backend(config.sparsity.backend, layout, torch.float32)
            total += sum(tensor.nbytes for tensor in backend.derive(topology))
    return total


def _measured_flops_per_second(config: Config) -> float:
    device = choose_device(config.training.device)
    dtype = torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    a @ a
    started, rounds = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.3:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        rounds += 1
    return rounds * 2 * 1024**3 / elapsed
