"""What a run will be, before it is one: layers, operations, bytes and an expected time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsae.config.complaints import telling_places
from sparsae.config.data import DataConfig
from sparsae.config.schema import Config
from sparsae.config.span import Horizon
from sparsae.core.accounting import FlopCounter, dense_state_bytes, estimated_state_bytes
from sparsae.core.budgets import density_factors
from sparsae.core.schedule import Schedule, counts_at
from sparsae.core.topology import Topology
from sparsae.data import load_tokenizer
from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import choose_backend
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import cut_short, layer_counts
from sparsae.rules import build_rule
from sparsae.rules.parts.rule import Rule
from sparsae.search.teacher import STORAGES, WarmUp
from sparsae.search.updates import SearchCost
from sparsae.train.costs import RunCosts
from sparsae.train.machine import require_machine
from sparsae.train.model import choose_device, density_of, initial_bounds, model_of, require_fit

_UNION = "what a union teacher remembers of dropped weights until they have faded, at most all that do not exist"


@telling_places
def forecast(config: Config) -> dict[str, Any]:
    """What a run would be, without data, weights or a directory: layers, operations, bytes and an expected time.

    Operations are those of `count_flops`; layers and bytes are those of the start, than which no later moment of a run
    has more, but for what a union teacher remembers of dropped weights ("uncounted"). The time is that of the dense
    products of all parts at the rate of a short measurement on this machine.
    """
    require_machine(config)
    require_fit(config)
    model = untrained(config)
    layers = sparse_layers(model)
    factors, cut = _factors(config, layers)
    rule = build_rule(config.topology, config.rules)
    costs = RunCosts(model, config, rule.micro_batch)
    training = config.training
    tokens = config.tokens_per_step
    weights, nnz = costs.cost.sparse_weights, costs.nnz
    flops, dense = count_flops(config, model)
    units = sum(layer.topology.count for layer in layers.values())
    teacher_weights = STORAGES[config.teacher.storage].size(nnz, weights) if config.teacher.enabled else 0
    others = sum(p.numel() for p in model.parameters()) - nnz
    state = estimated_state_bytes(nnz, _index_bytes(config, layers), teacher_weights=teacher_weights)
    schedule = Schedule.of(config.sparsity.schedule, rule.moves)
    if window := _window_bytes(rule, schedule, layers, Horizon(training.steps)):
        state["window"] = window
    if config.teacher.enabled and config.teacher.grown == "student":
        state["teacher"] += 4 * units  # their ages
    dense_state = partial(dense_state_bytes, teacher=config.teacher.enabled)
    return {
        "parameters": others + nnz,
        "parameters_dense": others + weights,
        "layers": [
            {
                "name": name,
                "out": layer.out_features,
                "in": layer.in_features,
                "nnz": layer.topology.nnz,
                "density": layer.topology.density,
                "density_factor": factors[name],
                "density_cut": name in cut,
            }
            for name, layer in layers.items()
        ],
        "density_steps": _density_steps(config, layers, rule),
        "train_flops_per_step": costs.cost.training(nnz, tokens),
        "train_flops": dict(flops.parts),
        "train_flops_dense_equivalent": flops.dense_equivalent,
        "state_bytes": state,
        "state_bytes_dense_equivalent": dense_state(weights),
        "model_state_bytes": sum(state.values()) + dense_state(others),
        "model_state_bytes_dense_equivalent": dense_state(others + weights),
        "expected_seconds": as_dense(flops, dense, model) / measured_flops_per_second(config),
        "uncounted": [_UNION] if config.teacher.enabled and config.teacher.storage == "union" else [],
        "steps": training.steps,
        "tokens": training.steps * tokens,
    }


def _factors(config: Config, layers: Mapping[str, SparseLinear]) -> tuple[dict[str, float], list[str]]:
    """The factor of each layer's density, and the layers in which bounds cut it short."""
    factors = density_factors(density_of(config), list(layers)) if layers else {}
    shapes, sparsity = {name: layer.shape for name, layer in layers.items()}, config.sparsity
    bounds = initial_bounds(config)
    return factors, cut_short(shapes, config.initial_sparsity, sparsity.budget, sparsity.block, bounds, factors)


@telling_places
def untrained(config: Config, vocab_size: int | None = None) -> nn.Module:
    """The model of a run on the meta device, where its layers have topologies and no values.

    vocab_size: entries of the tokenizer; None: those of the given one, or as many as one trained here may have.
    """
    vocab_size = expected_vocabulary(config.data) if vocab_size is None else vocab_size
    return model_of(config, vocab_size, 0, torch.device("meta"))


def expected_vocabulary(data: DataConfig) -> int:
    """Entries of the tokenizer, of one that is trained as many as it may have. InputError if there is no such one."""
    return data.tokenizer_vocab if data.tokenizer == "train" else load_tokenizer(data.tokenizer).vocab_size


def count_flops(config: Config, model: nn.Module) -> tuple[FlopCounter, FlopCounter]:
    """Operations of a whole run, and those of the same run with every weight, as far as they are known beforehand.

    It is assumed that lambda stays, that no candidate is rejected, that the warm-up of the teacher is by fraction, that
    a teacher holds what its student does, and that pruning keeps the layers' proportions.
    """
    rule = build_rule(config.topology, config.rules)
    return _expected_flops(config, rule, RunCosts(model, config, rule.micro_batch), sparse_layers(model))


def as_dense(flops: FlopCounter, dense: FlopCounter, model: nn.Module) -> float:
    """What `count_flops` found, if all arithmetic were dense, as the reference backend's is: kernels need less."""
    topologies = [layer.topology for layer in sparse_layers(model).values()]
    weights, nnz = sum(math.prod(each.shape) for each in topologies), sum(each.nnz for each in topologies)
    return dense.total + flops.parts["search"] * weights / max(1, nnz)


def _expected_flops(
    config: Config, rule: Rule[Any], costs: RunCosts, layers: Mapping[str, SparseLinear]
) -> tuple[FlopCounter, FlopCounter]:
    """Operations of the run as its number of active weights will move; and of its steps, with a dense teacher."""
    training = config.training
    horizon = Horizon(training.steps)
    steps, micro_tokens = training.steps, training.batch_size * config.model.context
    tokens = micro_tokens * training.accumulation
    topologies = first = {name: layer.topology for name, layer in layers.items()}
    units = {name: topology.units for name, topology in topologies.items()}
    start = {name: topology.count for name, topology in topologies.items()}
    block = math.prod(config.sparsity.block)
    end = round((1.0 - config.sparsity.sparsity) * sum(units.values()))
    schedule, level = Schedule.of(config.sparsity.schedule, rule.moves), 1.0
    active, ends = dict(start), schedule.ends(start, _last(config, layers)) if schedule.moves else {}
    flops, dense = FlopCounter(), FlopCounter()
    warmup = WarmUp(config.teacher, steps)
    last: dict[str, int] = {}  # after which step each layer's connections moved last
    updates = set(rule.updates(horizon))
    moves = set(schedule.steps(horizon, updates))
    counted = 0
    for step in sorted({*updates, *moves, steps}):
        # Between two of these moments all steps cost the same, but for the teacher, whose sequences are added up.
        taught, stretch = 0, range(counted, step)
        if config.teacher.enabled:
            taught = config.model.context * warmup.taught_over(stretch, training.accumulation, training.batch_size)
        teacher_nnz = STORAGES[config.teacher.storage].size(costs.nnz, costs.cost.sparse_weights)
        costs.count_step(flops, len(stretch) * tokens, taught, teacher_nnz)
        costs.count_step(dense, len(stretch) * tokens, taught, costs.cost.sparse_weights)
        counted = step
        if step in updates:
            concerned = rule.concerns(topologies, range(step, step + 1), horizon)
            # In the layers' order, by which a rule may round.
            moved = {name: topology for name, topology in topologies.items() if name in concerned}
            growth = rule.growth(moved, rule.initial_state(), step / steps)
            windows = rule.windows(moved, rule.initial_state())
            probed = {}
            for name in moved:
                own, count = rule.of(name), active[name]
                is_dense = "dense_gradient" in own.needs
                if growth.get(name) or not is_dense:
                    seen = micro_tokens if is_dense and own.accumulate == "last" else tokens
                    averaged = windows[name].count(step - last.get(name, 0), horizon)
                    seen = round(seen * costs.share(name))
                    probed[name] = (block * own.probed_units(count, units[name] - count), averaged * seen)
                last[name] = step
            forwards, own_step = 0, range(step, step + 1)
            if rule.micro_batch and rule.compares(own_step, horizon):
                forwards = 1 + rule.candidates_scored(moved, own_step, horizon)
            backwards = forwards if "candidate_gradient" in rule.needs else 0
            costs.count_update(flops, SearchCost(forwards, backwards, probed))
        if step in moves:
            level = schedule.level(step, horizon, level)
            active, last = counts_at(ends, level), dict.fromkeys(topologies, step)
            costs.follow({name: block * count for name, count in active.items()})
            # Which units there will be is not known; the first ones stand for as many.
            topologies = {n: Topology(t.shape, t.indices[: active[n]], t.unit) for n, t in first.items()}
        elif step in updates and not schedule.moves:
            total = rule.active_units(sum(start.values()), end, step, horizon)
            active = {name: round(total / sum(start.values()) * count) for name, count in start.items()}
            costs.follow({name: block * count for name, count in active.items()}, total=block * total)
    return flops, dense


def _window_bytes(rule: Rule[Any], schedule: Schedule, layers: Mapping[str, SparseLinear], horizon: Horizon) -> int:
    """Bytes of gradients that are summed for an update, as float32: units, their sums, and the step that comes in."""
    total, gaps = 0, dict[int, int]()  # the longest before an update in which no connection moves, of each rule
    moves = set(schedule.steps(horizon, rule.updates(horizon)))
    for name, window in rule.windows(layers, rule.initial_state()).items():
        own, topology = rule.of(name), layers[name].topology
        if window.length(horizon) == 1:
            continue
        if id(own) not in gaps:
            due = set(own.updates(horizon))
            pairs = itertools.pairwise(sorted({0, *due, *moves}))
            gaps[id(own)] = max((after - before for before, after in pairs if after in due), default=0)
        is_dense = "dense_gradient" in own.needs
        looked = topology.units if is_dense else own.probed_units(topology.count, topology.units - topology.count)
        held = 4 * min(window.count(gaps[id(own)], horizon), 2) * math.prod(topology.unit)
        total += looked * (held if is_dense or not held else held + topology.indices.itemsize)
    return total


def _density_steps(config: Config, layers: Mapping[str, SparseLinear], rule: Rule[Any]) -> list[dict[str, Any]]:
    """The active weights at the start, and after each step at which a density schedule begins or ends to move them."""
    schedule, horizon = Schedule.of(config.sparsity.schedule, rule.moves), Horizon(config.training.steps)
    if not schedule.moves:
        return []
    topologies = {name: layer.topology for name, layer in layers.items()}
    start, units = ({n: getattr(t, what) for n, t in topologies.items()} for what in ("count", "units"))
    ends, block = schedule.ends(start, _last(config, layers)), math.prod(config.sparsity.block)
    found, level = [], 1.0
    for step in [0, *schedule.moments(horizon)]:
        level = schedule.level(step, horizon, level)
        count = sum(counts_at(ends, level).values())
        found.append({"step": step, "nnz": block * count, "density": count / sum(units.values())})
    return found


def _last(config: Config, layers: Mapping[str, SparseLinear]) -> dict[str, int]:
    """Each layer's units at the end of a run whose rule keeps what the schedule gives it."""
    sparsity, factors = config.sparsity, density_factors(density_of(config), list(layers))
    return layer_counts(
        {name: layer.shape for name, layer in layers.items()},
        sparsity.sparsity,
        sparsity.budget,
        sparsity.block,
        sparsity.density_bounds,
        factors,
        {name: layer.topology.count for name, layer in layers.items()},
    )


def _index_bytes(config: Config, layers: Mapping[str, SparseLinear]) -> int:
    """Bytes of indices, and of what the backends that will serve the layers keep beside them."""
    total = 0
    for layer in layers.values():
        topology = layer.topology
        total += 2 * topology.indices.nbytes  # the copy that state dicts have, and the one that kernels read
        if choose_device(config.training.device).type == "cpu":
            layout = Layout(topology.shape, topology.unit, topology.indices)
            backend = choose_backend(config.sparsity.backend, layout, torch.float32)
            total += sum(tensor.nbytes for tensor in backend.derive(topology))
    return total


def measured_flops_per_second(config: Config) -> float:
    """Of a dense product on the device and in the precision of the settings, measured in a third of a second."""
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
