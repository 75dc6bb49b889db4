"""A density schedule beside every registered rule that keeps the number of connections."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae.config.schedule import ScheduleConfig
from sparsae.config.span import Horizon
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.schedule import Schedule, counts_at
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.parameterization import Parameterization, ParameterizationConfig
from sparsae.registry import RULES
from sparsae.rules import GmpConfig, RiglConfig, SetConfig, StaticConfig, build_rule
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import OPTIMIZERS, frequent, run_steps, score_of
from tests.support.schedules import KINDS, every_kind, every_rule

STEPS, WIDTH, SPARSITY = 40, 24, 0.8


def prepare(
    name: str, schedule: ScheduleConfig, optimizer: str = "ours", unit: tuple[int, int] = (1, 1), **limits: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    sparsify(model, 1 - schedule.first_factor * (1 - SPARSITY), unit=unit, seed=1, **limits)
    settings = RULES[name].settings.model_validate(frequent(name, 4))
    sparsifier = Sparsifier(
        model,
        (made := OPTIMIZERS[optimizer](model)),
        SparsifierConfig(
            steps=STEPS,
            topology=settings,
            schedule=schedule,
            sparsity=SPARSITY if schedule.moves else None,
            **{key: value for key, value in limits.items() if key != "heads"},
        ),
        score=score_of(model) if build_rule(settings).micro_batch else None,  # type: ignore[arg-type]
        heads=limits.get("heads"),
        parameterization=Parameterization(ParameterizationConfig(), WIDTH, 1),
    )
    return model, made, sparsifier


def counts(model: nn.Module) -> dict[str, int]:
    return {name: layer.topology.count for name, layer in sparse_layers(model).items()}


@every_rule
@every_kind
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_density_follows_the_schedule_under_every_rule(name: str, kind: str, unit: tuple[int, int]) -> None:
    model, optimizer, sparsifier = prepare(name, KINDS[kind], unit=unit)
    block, units = unit[0] * unit[1], 4 * WIDTH * WIDTH // (unit[0] * unit[1])
    end, search = round((1 - SPARSITY) * units), sparsifier.search
    first, horizon = sum(counts(model).values()), Horizon(STEPS)
    assert first == round(KINDS[kind].first_factor * (1 - SPARSITY) * units)
    seen, level, rule = [first], 1.0, search.rule
    for step in range(1, STEPS + 1):
        run_steps(model, optimizer, sparsifier, 1)
        if search.schedule.due(step, horizon, rule.due(step, horizon)):
            level = search.schedule.level(step, horizon, level)
        assert sparsifier.nnz == block * sum(counts_at(search.ends, level).values())
        for layer in sparse_layers(model).values():
            state = optimizer.state[layer.values]
            assert {state[key].shape for key in ("step", "exp_avg", "exp_avg_sq")} == {layer.values.shape}
        seen.append(sparsifier.nnz // block)
    assert seen[-1] == end
    low = min(seen)
    assert (first, low) == (
        (2 * end, end) if kind == "bump" else (end, sum(max(1, round(0.5 * n)) for n, _ in search.ends.values()))
    )
    turn = seen.index(low)
    assert seen[: turn + 1] == sorted(seen[: turn + 1], reverse=True)
    assert seen[turn:] == sorted(seen[turn:])
    # Wherever density moves, it moves in several steps.
    assert len(set(seen)) > 4


@every_rule
def test_the_rule_goes_on_as_without_one_until_density_moves(name: str) -> None:
    late = ScheduleConfig(kind="restore", start=0.8, stop=0.85, rise_start=0.9, rise_stop=0.95)
    found = []
    for schedule in (ScheduleConfig(), late):
        model, optimizer, sparsifier = prepare(name, schedule)
        run_steps(model, optimizer, sparsifier, 30)
        found.append([layer.values.detach().clone() for layer in sparse_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_smallest_weights_of_each_layer_go_and_what_stays_keeps_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, sparsifier = prepare("static", ScheduleConfig(kind="bump", every=4))
    layers, update = sparse_layers(model), sparsifier.search.update
    before: dict[str, tuple[Topology, Tensor, Tensor]] = {}

    def watched(step: int, stepped: bool = True) -> Any:
        for name, layer in layers.items():
            average = optimizer.state[layer.values]["exp_avg"].clone()
            before[name] = layer.topology, layer.values.detach().clone(), average
        return update(step, stepped)

    monkeypatch.setattr(sparsifier.search, "update", watched)
    moved = 0
    for _ in range(STEPS):
        run_steps(model, optimizer, sparsifier, 1)
        for name, (topology, values, average) in before.items():
            kept = layers[name].topology.contains(topology.indices)
            assert torch.equal(layers[name].values.detach(), values[kept])
            assert torch.equal(optimizer.state[layers[name].values]["exp_avg"], average[kept])
            if not bool(kept.all()):
                assert float(values[~kept].abs().max()) <= float(values[kept].abs().min())
                moved += 1
    assert moved >= 6


def test_what_comes_back_is_random_and_begins_at_zero() -> None:
    model, optimizer, sparsifier = prepare("static", ScheduleConfig(kind="restore", factor=0.5, every=4))
    grown = 0
    for _ in range(STEPS):
        before = {name: layer.topology for name, layer in sparse_layers(model).items()}
        run_steps(model, optimizer, sparsifier, 1)
        for name, layer in sparse_layers(model).items():
            new = ~before[name].contains(layer.topology.indices)
            grown += int(new.sum())
            assert not bool(layer.values.detach()[new].any())
            assert not bool(optimizer.state[layer.values]["exp_avg"][new].any())
    assert grown == sum(first - last for first, last in sparsifier.search.ends.values())


@every_kind
@pytest.mark.parametrize("name", ["static", "set", "rigl", "evolution"])
@pytest.mark.parametrize("fans", [("fan_in",), ("fan_in", "fan_out")])
def test_neurons_and_heads_keep_their_limits(kind: str, name: str, fans: tuple[str, ...]) -> None:
    share = {"fan_in": (1.0, 1.0), "fan_out": (0.25, 3.0)}
    limits: dict[str, Any] = {fan: share[fan] for fan in fans}
    model, optimizer, sparsifier = prepare(
        name, KINDS[kind], head_min_density=0.05, heads={"0": HeadLayout("out", 12)}, **limits
    )
    for _ in range(STEPS):
        run_steps(model, optimizer, sparsifier, 1)
        for layer_name, layer in sparse_layers(model).items():
            for part in sparsifier.search.gradients.groups[layer_name]:
                now = part.at(layer.topology.count)
                of_each = now.counts(layer.topology.indices)
                assert now.least <= int(of_each.min()), (part.fan, sparsifier.step)
                assert int(of_each.max()) <= now.most, (part.fan, sparsifier.step)


@every_kind
@pytest.mark.parametrize("name", ["static", "rigl", "gse", "evolution"])
@pytest.mark.parametrize("at", [7, 20, 31])
def test_a_saved_training_goes_on_to_the_last_bit(kind: str, name: str, at: int) -> None:
    whole, optimizer, sparsifier = prepare(name, KINDS[kind])
    run_steps(whole, optimizer, sparsifier, at)
    saved = {
        "model": {key: value.clone() for key, value in whole.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "sparsifier": sparsifier.state_dict(),
    }
    json.dumps(saved["sparsifier"]["search"]["level"])
    again, other, same = prepare(name, KINDS[kind])
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    same.load_state_dict(saved["sparsifier"])
    run_steps(whole, optimizer, sparsifier, STEPS - at)
    run_steps(again, other, same, STEPS - at)
    for one, two in zip(sparse_layers(whole).values(), sparse_layers(again).values(), strict=True):
        assert torch.equal(one.topology.indices, two.topology.indices)
        assert torch.equal(one.values, two.values)
    assert sparsifier.nnz == same.nnz


@every_kind
def test_it_goes_on_under_another_rule(kind: str) -> None:
    model, optimizer, sparsifier = prepare("set", KINDS[kind])
    run_steps(model, optimizer, sparsifier, 20)
    level = sparsifier.search.level
    sparsifier.set_rule(RiglConfig(every=3))
    assert sparsifier.search.level == level < 1
    run_steps(model, optimizer, sparsifier, 20)
    assert sum(counts(model).values()) == round((1 - SPARSITY) * 4 * WIDTH * WIDTH)
    model, optimizer, sparsifier = prepare("set", KINDS[kind])
    with pytest.raises(InputError, match=r"continues: leave out sparsity 0\.9"):
        sparsifier.set_rule(RiglConfig(), sparsity=0.9)
    with pytest.raises(InputError, match="prunes by a schedule of its own"):
        sparsifier.set_rule(GmpConfig())


@every_kind
def test_an_update_that_waits_is_made_up_for(kind: str) -> None:
    model, optimizer, sparsifier = prepare("static", KINDS[kind])
    for step in range(1, STEPS + 1):
        x = torch.randn(8, WIDTH)
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        broken = step % 3 != 0
        (loss * torch.inf if broken else loss).backward()
        sparsifier.before_step()
        if not broken:
            optimizer.step()
        sparsifier.after_step()
    assert sparsifier.search.level == (0.0 if kind == "bump" else 1.0)
    assert sum(counts(model).values()) == round((1 - SPARSITY) * 4 * WIDTH * WIDTH)


@every_kind
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_any_optimizers_state_follows(kind: str, optimizer: str) -> None:
    model, made, sparsifier = prepare("set", KINDS[kind], optimizer)
    run_steps(model, made, sparsifier, STEPS)
    for layer in sparse_layers(model).values():
        assert all(s.shape in (layer.values.shape, ()) for s in made.state[layer.values].values() if s is not None)


@given(
    steps=st.integers(2, 400),
    shares=st.lists(st.integers(0, 20), min_size=4, max_size=4, unique=True).map(sorted),
    restores=st.booleans(),
    every=st.sampled_from([None, 1, 7, "3%"]),
    longer=st.integers(1, 3),
)
def test_the_level_falls_and_rises_once_and_ends_where_it_shall(
    steps: int, shares: list[int], restores: bool, every: int | str | None, longer: int
) -> None:
    start, stop, rise_start, rise_stop = (share / 20 for share in shares)
    rise = {"rise_start": rise_start, "rise_stop": rise_stop} if restores else {}
    config = ScheduleConfig(kind="restore" if restores else "bump", start=start, stop=stop, every=every, **rise)
    schedule, level, levels = Schedule.of(config, rule_moves=True), 1.0, [1.0]
    for each in (schedule, Schedule.of(config, rule_moves=False)):
        moves = [step for step in range(1, steps + 1) if each.due(step, Horizon(steps), step % 5 == 0)]
        assert each.steps(Horizon(steps), range(5, steps + 1, 5)) == moves
    # A run that was made longer after its end begins from the level that it has reached.
    for horizon, first in ((Horizon(steps), 1), (Horizon(longer * steps), steps + 1)):
        for step in range(first, horizon.steps + 1):
            if schedule.due(step, horizon, updates=step % 5 == 0):
                level = schedule.level(step, horizon, level)
            levels.append(level)
        assert level == (1.0 if restores else 0.0)
    falls = [b < a for a, b in itertools.pairwise(levels)]
    rises = [b > a for a, b in itertools.pairwise(levels)]
    if longer == 1 and any(rises):
        assert not any(falls[rises.index(True) :])
    assert restores or not any(rises)


@pytest.mark.parametrize(
    ("sparsity", "settings", "says"),
    [
        (0.6, {"topology": SetConfig(), "schedule": KINDS["bump"]}, "schedule bump moves density: set the sparsity"),
        (0.3, {"topology": SetConfig(), "schedule": KINDS["bump"], "sparsity": 0.8}, "the model is denser .* to 0.6"),
        (0.9, {"topology": SetConfig(), "schedule": KINDS["bump"], "sparsity": 0.8}, "the model is sparser already"),
        (0.8, {"topology": SetConfig(), "schedule": KINDS["restore"]}, "schedule restore moves density: set the spars"),
        (0.8, {"topology": SetConfig(), "schedule": KINDS["restore"], "sparsity": 0.9}, "denser .sparsify it to 0.9"),
        (0.95, {"topology": SetConfig(), "schedule": KINDS["restore"], "sparsity": 0.8}, "sparser already"),
        (0.6, {"topology": GmpConfig(), "schedule": KINDS["bump"], "sparsity": 0.8}, "prunes by a schedule of its own"),
        (0.8, {"topology": StaticConfig(), "sparsity": 0.8}, "keeps the model's sparsity"),
    ],
)
def test_a_loop_of_ones_own_is_told_as_well(sparsity: float, settings: dict[str, Any], says: str) -> None:
    model = sparsify(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), sparsity)
    with pytest.raises(InputError, match=says):
        Sparsifier(model, torch.optim.AdamW(model.parameters()), SparsifierConfig(steps=9, **settings))


@pytest.mark.parametrize("name", ["gse", "rigl"])
def test_gradients_that_were_averaged_for_an_update_are_gone_once_density_moves(name: str) -> None:
    """Between the rule's updates too, so that every state can be loaded: what has grown is no inactive connection."""
    settings = RULES[name].settings.model_validate({"every": 5, "window": 3})

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        sparsify(model, SPARSITY, seed=1)
        optimizer = OPTIMIZERS["adamw"](model)
        restore = ScheduleConfig(kind="restore", every=2)
        config = SparsifierConfig(steps=STEPS, topology=settings, schedule=restore, sparsity=SPARSITY)
        return model, optimizer, Sparsifier(model, optimizer, config)

    parts, held = make(), 0
    for step in range(1, STEPS):
        run_steps(*parts, 1)
        state = parts[2].state_dict()
        held += bool(state["search"]["windows"])
        again = make()
        for part, other in zip(parts[:2], again[:2], strict=True):
            other.load_state_dict(part.state_dict())
        again[2].load_state_dict(state)
        assert again[2].step == step
    assert held
