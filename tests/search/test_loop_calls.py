"""What a loop around a Sparsifier may forget, gradients that are no numbers, and more than one rank."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.backend import Layout
from sparsae.kernels.probe import LargestGradients, new_key
from sparsae.kernels.registry import BACKENDS
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.rules import EvolutionConfig, RiglConfig, StaticConfig
from sparsae.rules.evolution import Evolution
from sparsae.rules.parts.rule import Candidate
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import mlp, score_of
from tests.support.sections import SECTIONS, backward, made

# Every registered rule that moves connections, from the first steps on, and some with other settings.


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_step_that_a_scaler_skips_leaves_the_topology_alone(
    section: str, unit: tuple[int, int], poison: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the rule; the update is made up for after the next step, and the row of each says what happened."""
    model, optimizer, sparsifier = made(section, unit=unit)
    layers = sparse_layers(model)
    skipped = accepted = 0
    # The first update, its second try, and the one after the third.
    outcomes = [True, True, False, True]
    for step in range(1, 13):
        optimizer.zero_grad()
        due = sparsifier.update_due
        is_bad = due and bool(outcomes) and outcomes.pop(0)
        backward(model, step, poison if is_bad else None)
        sparsifier.before_step()
        if not is_bad:
            optimizer.step()
        before = {name: (layer.topology, layer.values.detach().clone()) for name, layer in layers.items()}
        update = sparsifier.after_step()
        assert (update is not None) == due
        if update is None:
            continue
        assert update.row["skipped"] == ("gradient" if is_bad else None)
        if is_bad:
            skipped += 1
            assert not update.accepted
            for name, layer in layers.items():
                assert layer.topology is before[name][0]
                assert torch.equal(layer.values.detach(), before[name][1])
        accepted += update.accepted
        assert sparsifier.search.waiting is is_bad
    assert skipped == 3 - sum(outcomes) >= 2
    assert accepted
    assert all(bool(layer.values.isfinite().all()) for layer in layers.values())
    assert sum("waits" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("section", ["gmp", "granet", "magnitude"])
def test_pruning_ends_where_it_shall_though_its_last_update_was_skipped(section: str) -> None:
    model, optimizer, sparsifier = made(section, steps=12, **({} if section == "magnitude" else {"stop": 0.5}))
    units = sum(layer.topology.units for layer in sparse_layers(model).values())
    last = 1 if section == "magnitude" else 6
    for step in range(1, 10):
        backward(model, step, math.nan if step in (last, last + 1) else None)
        sparsifier.before_step()
        if step not in (last, last + 1):
            optimizer.step()
        sparsifier.after_step()
        optimizer.zero_grad()
        if step == last + 1:
            assert sparsifier.state_dict()["search"]["waiting"]
            assert sparsifier.nnz > round(0.1 * units)
    assert sparsifier.nnz == round(0.1 * units)


def test_a_waiting_update_survives_a_checkpoint() -> None:
    model, optimizer, sparsifier = made("rigl")
    for step in (1, 2):
        backward(model, step, math.inf if step == 2 else None)
        sparsifier.before_step()
        sparsifier.after_step()
        optimizer.zero_grad()
    again_model, again_optimizer, again = made("rigl")
    again_model.load_state_dict(model.state_dict())
    again.load_state_dict(sparsifier.state_dict())
    for m, o, s in ((model, optimizer, sparsifier), (again_model, again_optimizer, again)):
        assert s.update_due
        backward(m, 3)
        s.before_step()
        o.step()
        update = s.after_step()
        assert update is not None
        assert update.accepted
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.indices, sparse_layers(again_model)[name].indices)


NUMBERS = st.sampled_from([0.0, 1.0, -2.0, 3.5, math.inf, -math.inf, math.nan])


@pytest.mark.parametrize("unit", [(1, 1), (2, 2)])
@given(st.integers(0, 2**20), st.integers(1, 40), st.lists(NUMBERS, min_size=4, max_size=4))
def test_the_largest_gradients_are_never_at_active_units(
    unit: tuple[int, int], seed: int, count: int, numbers: list[float]
) -> None:
    topology = Topology.random((8 * unit[0], 8 * unit[1]), 24, generator(seed), unit)
    probe = LargestGradients(new_key(), count, "last")
    dy = torch.randn(3, topology.shape[0], generator=generator(seed, "dy"))
    x = torch.randn(3, topology.shape[1], generator=generator(seed, "x"))
    for i, number in enumerate(numbers):
        (dy if i % 2 else x)[i % 3, (7 * i + seed) % x.shape[1]] = number
    probe.add(BACKENDS["reference"], Layout(topology.shape, topology.unit, topology.indices), dy, x)
    probe.close()
    assert probe.units is not None
    assert probe.gradient is not None
    assert probe.units.numel() == min(count, 40)
    assert not topology.contains(probe.units).any()
    finite = bool((x.T @ dy).isfinite().all())
    if finite:
        assert bool(probe.gradient.isfinite().all())
    elif count == 40:
        # The active ones show in the gradient of the values.
        inactive = ~topology.to_mask()
        assert bool(probe.gradient.isfinite().all()) == bool((dy.T @ x)[inactive].isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("term", ["cross_entropy", "diversity", "activity"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("selection", ["comma", "elitist"])
def test_a_candidate_whose_score_is_no_number_is_never_chosen(
    bad: float, term: str, standardize: bool, selection: str
) -> None:
    config = EvolutionConfig.model_validate(
        {"selection": selection, "candidates": 2, "proxy": {"standardize": standardize}}
    )
    rule = Evolution(config)
    current = {"cross_entropy": 1.0, "diversity": 0.1, "activity": 0.2}
    parts = current | {term: bad}
    candidates = [Candidate(Swap({}, {}), "uniform") for _ in range(2)]
    better = current | {"cross_entropy": 0.5}
    state = rule.initial_state()
    decision, after = rule.tell(candidates, [parts, better], current, state, 0.1)
    assert decision.chosen == 1
    decision, _ = rule.tell(candidates, [parts, None], current, state, 0.1)
    assert decision.chosen is None
    assert all(math.isfinite(moments.mean) for moments in after.running.terms.values())


class Order:
    """Steps of a loop whose calls may be left out or come in another order."""

    def __init__(self, section: str, **settings: Any) -> None:
        self.model, self.optimizer, self.sparsifier = made(section, **settings)
        self.step = 0

    def run(self, *calls: str) -> None:
        self.step += 1
        for call in calls:
            match call:
                case "backward":
                    backward(self.model, self.step)
                case "before":
                    self.sparsifier.before_step()
                case "step":
                    self.optimizer.step()
                case "zero":
                    self.optimizer.zero_grad()
                case "after":
                    self.sparsifier.after_step()


RIGHT = ("backward", "before", "step", "after", "zero")


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    "calls",
    [
        RIGHT,
        ("backward", "before", "step", "zero", "after"),
        ("zero", "backward", "before", "step", "after"),
        ("zero", "backward", "backward", "before", "step", "after"),
    ],
)
def test_a_right_loop_is_told_nothing(section: str, calls: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    loop = Order(section)
    for _ in range(8):
        loop.run(*calls)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_step_at_rate_zero_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loop = Order("rigl")
    loop.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(4):
        loop.run(*RIGHT)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    ("calls", "told"),
    [
        (("backward", "before", "step", "zero"), "before_step() was called twice"),
        (("backward", "before", "before", "step", "after", "zero"), "before_step() was called twice"),
        (("backward", "before", "after", "zero"), "call optimizer.step() between"),
        (("backward", "step", "before", "after", "zero"), "call optimizer.step() between"),
    ],
)
def test_a_call_that_is_missing_is_told_once(
    section: str, calls: tuple[str, ...], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Order(section)
    for _ in range(8):
        loop.run(*calls)
    assert sum(told in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_after_step_alone_is_refused(section: str) -> None:
    with pytest.raises(InputError, match=r"after_step\(\) without before_step\(\)"):
        Order(section).run("backward", "step", "after")


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("calls", [("before", "step", "after"), ("backward", "step", "zero", "before", "after")])
def test_gradients_that_are_gone_are_told_and_refused_where_they_decide(
    section: str, calls: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    loop = Order(section)
    needs = loop.sparsifier.search.rule.needs & {"gradient", "gradient_at", "dense_gradient"}

    def run() -> None:
        for _ in range(4):
            loop.run(*calls)

    if needs:
        with pytest.raises(InputError, match="no sparse layer has a gradient"):
            run()
        assert loop.step <= 2
    else:
        run()
    # An error at the first step says it all.
    told = sum("no sparse layer has a gradient" in record.message for record in caplog.records)
    assert told == (loop.step > 1)


@pytest.mark.parametrize("section", ["set", "rigl", "gse", "evolution"])
def test_a_run_that_is_shorter_than_an_interval_says_so(section: str, caplog: pytest.LogCaptureFixture) -> None:
    made(section, steps=20, every=100)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"rule '{section}' moves no connection in 20 steps" in record.message


@pytest.mark.parametrize("section", ["set", "rigl"])
def test_a_training_that_is_longer_than_was_said_says_so_once(section: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Order(section, steps=10)
    for _ in range(10):
        loop.run(*RIGHT)
    assert not caplog.records
    for _ in range(3):
        loop.run(*RIGHT)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "step 11 is beyond the 10 of SparsifierConfig.steps" in record.message


def test_layers_that_are_frozen_need_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    loop = Order("rigl")
    for layer in sparse_layers(loop.model).values():
        layer.values.requires_grad_(False)
    for _ in range(4):
        loop.run("zero", "before", "after")
    assert not any("no sparse layer has a gradient" in record.message for record in caplog.records)


def test_a_static_topology_needs_no_calls(caplog: pytest.LogCaptureFixture) -> None:
    loop = Order("static")
    for _ in range(3):
        loop.run("backward", "step", "after", "zero")
    assert not caplog.records


def test_moments_of_an_optimizer_without_any_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    topology = EvolutionConfig.model_validate(
        {"every": 2, "selection": "elitist", "proxy": {"terms": {"activity": {"source": "moments"}}}, "candidates": 2}
    )
    score: Any = score_of(model)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=9, topology=topology), score=score)
    for step in range(2):
        backward(model, step)
        sparsifier.before_step()
        optimizer.step()
        if step == 0:
            sparsifier.after_step()
    with pytest.raises(InputError, match="SGD has no average gradient"):
        sparsifier.after_step()


@pytest.mark.parametrize("section", ["rigl", "gse", "gmp", "evolution"])
def test_a_real_scaler_overflows_and_the_search_goes_on(section: str) -> None:
    """torch's GradScaler begins far too high and halves its scale until gradients fit."""
    model, optimizer, sparsifier = made(section, steps=40)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-2, growth_interval=1000)
    skipped = accepted = 0
    for step in range(1, 31):
        optimizer.zero_grad()
        loss = 2.0**16 * (model(torch.randn(8, 24, generator=generator(step, "x"))) - 1.0).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        sparsifier.before_step()
        scaler.step(optimizer)
        scaler.update()
        update = sparsifier.after_step()
        if update is not None:
            skipped += update.row["skipped"] is not None
            accepted += update.accepted
    assert skipped
    assert accepted
    assert all(bool(layer.values.isfinite().all()) for layer in sparse_layers(model).values())


def test_layers_that_share_their_values_cannot_move() -> None:
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))
    sparsify(model, 0.8, budget="uniform")
    one, _, other = sparse_layers(model).values()
    other.load_state_dict(one.state_dict())
    other.values = one.values
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="layers 0 and 2 share their values"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=9, topology=RiglConfig(every=2)))
    Sparsifier(model, optimizer, SparsifierConfig(steps=9, topology=StaticConfig()))


def test_a_layer_that_left_the_model_is_told() -> None:
    model, _, sparsifier = made("rigl")
    model[0] = copy.deepcopy(model[0])  # type: ignore[index,operator]
    backward(model, 0)
    with pytest.raises(InputError, match="layer 0 was replaced in the model"):
        sparsifier.before_step()


@pytest.mark.parametrize("between", [lambda model: model.to("cpu"), lambda model: model.load_state_dict(_taken(model))])
def test_a_model_that_is_moved_or_loaded_between_steps_goes_on(between: Any) -> None:
    model, optimizer, sparsifier = made("rigl")
    updates = 0
    for step in range(4):
        between(model)
        optimizer.zero_grad()
        backward(model, step)
        sparsifier.before_step()
        optimizer.step()
        updates += sparsifier.after_step() is not None
    assert updates == 2


def _taken(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())
