"""Values from before an update: of the right step, under the same topology, carried through checkpoints."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.cadence import Periodic
from sparsae.core.observation import Observation, PastValues
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.rules.parts.rule import Candidate, NoState, Rule
from sparsae.runs.checkpoint import joined, split
from sparsae.search.sparsifier import Sparsifier
from sparsae.surgery import prepare_swap
from tests.support.loops import mlp

STEPS, EVERY = 24, 6
WINDOWS = (1, 4, 6, 9)
Seen = list[tuple[int, dict[str, dict[int, Tensor]]]]


class Watching(Rule[NoState]):
    """Exchanges a few connections of each layer, and keeps what it saw of the past."""

    when = Periodic(EVERY)
    needs = frozenset(PastValues(window) for window in WINDOWS)

    def __init__(self) -> None:
        self.seen: Seen = []

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        views = observation.layers
        past = {name: {w: values.clone() for w, values in view.past.items()} for name, view in views.items()}
        self.seen.append((observation.step, past))
        topologies = observation.topologies
        drop = {name: topology.indices[:3] for name, topology in topologies.items()}
        return [Candidate(Swap(drop, {name: t.sample_inactive(3, rng) for name, t in topologies.items()}), "few")]


Parts = tuple[nn.Module, torch.optim.Optimizer, Sparsifier, Watching]


def made() -> Parts:
    model, rule = mlp(), Watching()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, Sparsifier(model, optimizer, SparsifierConfig(steps=STEPS), rule=rule), rule


def step_of(parts: Parts, *, broken: bool = False) -> None:
    model, optimizer, sparsifier, _ = parts
    optimizer.zero_grad()
    model(torch.randn(8, 24, generator=generator(5, sparsifier.step))).square().mean().backward()
    layer = next(iter(sparse_layers(model).values()))
    if broken:
        assert layer.values.grad is not None
        layer.values.grad[0] = torch.inf
    sparsifier.before_step()
    if not broken:  # as a gradient scaler does
        optimizer.step()
    sparsifier.after_step()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.values.detach().clone() for name, layer in sparse_layers(model).items()}


def held(sparsifier: Sparsifier) -> set[str]:
    return set(sparsifier.state_dict()["search"]["past"])


def assert_equal(one: Seen, two: Seen) -> None:
    assert [step for step, _ in one] == [step for step, _ in two]
    for (_, before), (_, after) in zip(one, two, strict=True):
        for name, windows in before.items():
            assert windows.keys() == after[name].keys() == set(WINDOWS)
            assert all(torch.equal(values, after[name][window]) for window, values in windows.items())


def test_values_are_those_of_so_many_steps_before_or_of_the_last_update() -> None:
    parts = made()
    values = {0: values_of(parts[0])}  # after each step and its update
    for step in range(1, STEPS + 1):
        step_of(parts)
        values[step] = values_of(parts[0])
    seen = parts[3].seen
    assert [step for step, _ in seen] == [6, 12, 18]
    for step, past in seen:
        for name, windows in past.items():
            assert windows.keys() == set(WINDOWS)
            for window, tensor in windows.items():
                assert torch.equal(tensor, values[max(step - window, step - EVERY)][name])


def test_they_are_kept_just_while_their_window_lasts() -> None:
    parts = made()
    for step in range(1, 19):
        step_of(parts)
        before = EVERY - step % EVERY if step < 18 else None  # steps until the next update; none follows the last
        assert held(parts[2]) == {str(window) for window in WINDOWS if before is not None and before <= window}


@pytest.mark.parametrize("stopped", range(1, 19))
def test_a_run_goes_on_bit_for_bit_wherever_it_stopped(stopped: int) -> None:
    parts, others = made(), made()
    for _ in range(stopped):
        step_of(parts)
    plain, tensors = split(parts[2].state_dict())
    others[0].load_state_dict(copy.deepcopy(parts[0].state_dict()))
    others[1].load_state_dict(copy.deepcopy(parts[1].state_dict()))
    others[2].load_state_dict(joined(json.loads(json.dumps(plain)), load(save(tensors))))
    seen = len(parts[3].seen)
    for _ in range(STEPS - stopped):
        step_of(parts)
        step_of(others)
    assert_equal(parts[3].seen[seen:], others[3].seen)


def test_an_update_that_waits_has_what_was_taken_for_it() -> None:
    parts, values = made(), {}
    for step in range(1, 8):
        values[step - 1] = values_of(parts[0])
        step_of(parts, broken=step == 6)
    ((step, past),) = parts[3].seen
    assert step == 7
    for name, windows in past.items():
        assert all(torch.equal(tensor, values[max(0, 6 - window)][name]) for window, tensor in windows.items())


def test_a_topology_changed_by_somebody_else_begins_its_layers_window() -> None:
    parts = made()
    layers: dict[str, SparseLinear] = sparse_layers(parts[0])
    for _ in range(3):
        step_of(parts)
    first, second = layers
    before = parts[2].state_dict()["search"]["past"]["4"][second]
    topology = layers[first].topology
    swap = Swap({first: topology.indices[:2]}, {first: topology.sample_inactive(2, generator(0))})
    prepare_swap(layers, swap, "zero", generator(0)).commit(parts[1])
    for _ in range(1):
        step_of(parts)
    begun = values_of(parts[0])
    for _ in range(2):
        step_of(parts)
    ((_, past),) = parts[3].seen
    assert torch.equal(past[first][4], begun[first])
    assert torch.equal(past[second][4], before)


def test_another_rule_begins_anew() -> None:
    _, _, sparsifier, _ = parts = made()
    for _ in range(3):
        step_of(parts)
    assert held(sparsifier) == {"4", "6", "9"}
    other: Any = Watching()
    other.needs = frozenset({PastValues(4)})
    other.when = Periodic(12)
    sparsifier.search.rule = other
    step_of(parts)
    assert held(sparsifier) == set()
