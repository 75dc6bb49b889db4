"""Growth from an average: sums over the steps before an update, at a sample that stays or dense, beside naive sums."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from sparsae.config.schedule import ScheduleConfig
from sparsae.config.span import Horizon
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.cadence import Cubic, Periodic, Window
from sparsae.core.observation import LayerView, Observation
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify
from sparsae.rules import EvolutionConfig, GseConfig, RiglConfig
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import LargestGradient, LargestSampledGradient
from sparsae.rules.parts.pruning import Pruning
from sparsae.rules.parts.rule import Candidate, NoState, Rule
from sparsae.runs.checkpoint import joined, split
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.windows import Upcoming
from sparsae.surgery import prepare_swap
from tests.support.loops import mlp

STEPS, EVERY, TOKENS = 26, 6, 8
Kind = Literal["sampled", "last", "sum"]
Unit = tuple[int, int]


class Watching(Exchange):
    """Keeps the views of its updates."""

    def __init__(self, kind: Kind, window: Window, every: int = EVERY) -> None:
        grow = LargestSampledGradient(0.7, window=window) if kind == "sampled" else LargestGradient(kind, window)
        super().__init__(
            "watching", when=Periodic(every), fraction=CosineFraction(0.6), drop=SmallestMagnitude(), grow=grow
        )
        self.seen: list[tuple[int, dict[str, LayerView]]] = []

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        self.seen.append((observation.step, dict(observation.layers)))
        return super().ask(observation, state, rng)


class Loop:
    """A training with explicit dense gradients beside it: of each step, by layer, over the positions in unit order."""

    def __init__(
        self, kind: Kind, window: Window, *, unit: Unit = (1, 1), passes: int = 1, rule: Any = None, **schedule: Any
    ) -> None:
        self.kind, self.passes, self.unit = kind, passes, unit
        self.model = mlp(unit=unit)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.rule = rule or Watching(kind, window)
        config = SparsifierConfig(steps=STEPS, accumulation=passes, **schedule)
        self.sparsifier = Sparsifier(self.model, self.optimizer, config, rule=self.rule)
        self.dense: dict[int, dict[str, Tensor]] = {}
        self.updates: dict[int, Any] = {}

    def loss(self, model: nn.Module, index: int, bad: bool) -> Tensor:
        x = torch.randn(TOKENS, 24, generator=generator(5, self.sparsifier.step, index))
        return model(x).square().mean() * (math.nan if bad else 1.0)

    def one(self, *, bad: bool = False, scale: float = 1.0) -> None:
        twin, step = densify(copy.deepcopy(self.model)), self.sparsifier.step + 1
        self.optimizer.zero_grad()
        for index in range(self.passes):
            (self.loss(self.model, index, bad) * scale).backward()
            if self.kind == "last":
                twin.zero_grad()
            self.loss(twin, index, bad).backward()
        if not bad:
            self.dense[step] = {name: _by_unit(twin, name, self.unit) for name in sparse_layers(self.model)}
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad /= scale
        self.sparsifier.before_step(None if scale == 1.0 else scale)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1e-3)
        if not bad:  # as a gradient scaler does
            self.optimizer.step()
        update = self.sparsifier.after_step()
        if update is not None:
            self.updates[step] = update

    def mean(self, steps: list[int]) -> dict[str, Tensor]:
        return {name: sum(self.dense[step][name] for step in steps) / len(steps) for name in sparse_layers(self.model)}

    def held(self) -> dict[str, Any]:
        found: dict[str, Any] = self.sparsifier.state_dict()["search"]["windows"]
        return found


def _by_unit(twin: nn.Module, name: str, unit: Unit) -> Tensor:
    gradient = twin.get_submodule(name).weight.grad
    assert isinstance(gradient, Tensor)
    rows, columns = gradient.shape[0] // unit[0], gradient.shape[1] // unit[1]
    blocks = gradient.view(rows, unit[0], columns, unit[1]).permute(2, 0, 1, 3).reshape(rows * columns, *unit)
    return blocks.reshape(-1) if unit == (1, 1) else blocks


def _size(gradient: Tensor) -> Tensor:
    return gradient.abs() if gradient.dim() == 1 else gradient.flatten(1).norm(dim=1)


def assert_seen(loop: Loop, averaged: dict[int, list[int]]) -> None:
    """What each update saw is the naive mean over the steps given."""
    assert [step for step, _ in loop.rule.seen] == list(averaged)
    for step, views in loop.rule.seen:
        for name, mean in loop.mean(averaged[step]).items():
            view = views[name]
            assert view.sample is not None
            assert view.sample_gradient is not None
            at = view.sample.long()
            assert not bool(view.topology.contains(view.sample).any())
            if loop.kind == "sampled":
                assert at.numel() == round(0.7 * view.topology.count)
                torch.testing.assert_close(view.sample_gradient, mean[at], rtol=1e-4, atol=1e-7)
                continue
            size, active = _size(mean), view.topology.indices.long()
            assert view.active_gradient is not None
            torch.testing.assert_close(view.active_gradient, size[active], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(view.sample_gradient, size[at], rtol=1e-4, atol=1e-7)
            size[active] = -1.0
            assert float(size[at].min()) >= float(size.topk(at.numel()).values[-1]) * (1 - 1e-4)


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("window", [Window(4), Window(5, 2), Window("100%", 4)])
@pytest.mark.parametrize("kind", ["sampled", "last", "sum"])
def test_an_update_sees_the_mean_of_its_windows_gradients(kind: Kind, window: Window, passes: int, unit: Unit) -> None:
    loop = Loop(kind, window, unit=unit, passes=passes)
    for step in range(20):
        loop.one(scale=2.0 ** (step % 5))  # a loss scale that moves
    length = min(window.length(Horizon(STEPS)), EVERY)  # no further back than the update before
    assert_seen(loop, {due: list(range(due, due - length, -window.every)) for due in (6, 12, 18)})
    seen = TOKENS * (1 if kind == "last" else passes)
    for update in loop.updates.values():
        for name, (weights, tokens) in update.cost.probed.items():
            topology = sparse_layers(loop.model)[name].topology
            units = round(0.7 * topology.count) if kind == "sampled" else topology.units - topology.count
            assert weights == units * math.prod(unit)
            assert tokens == seen * window.count(EVERY, Horizon(STEPS))


@pytest.mark.parametrize("kind", ["sampled", "last", "sum"])
def test_steps_that_are_not_finite_are_left_out(kind: Kind) -> None:
    loop = Loop(kind, Window(4))
    for step in range(1, 20):
        loop.one(bad=step in (4, 9, 12, 13))  # inside a window, its first, and twice where the update is due
    assert_seen(loop, {6: [3, 5, 6], 14: [10, 11, 14], 18: [15, 16, 17, 18]})
    assert {step: update.row["skipped"] for step, update in loop.updates.items()} == {
        **dict.fromkeys((6, 14, 18)), **dict.fromkeys((12, 13), "gradient")
    }  # fmt: skip
    # Gradients that were computed are counted, each once.
    tokens = {step: update.cost.probed["0"][1] for step, update in loop.updates.items()}
    assert tokens == {6: 4 * TOKENS, 12: 4 * TOKENS, 13: TOKENS, 14: TOKENS, 18: 4 * TOKENS}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["sampled", "sum"])
def test_a_gradient_scaler_whose_factor_moves(kind: Kind, fused: bool) -> None:
    loop = Loop(kind, Window(5))
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-2, fused=fused)
    loop.rule.seen = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    config = SparsifierConfig(steps=STEPS)
    loop.sparsifier = Sparsifier(loop.model, loop.optimizer, config, rule=loop.rule).attach(scaler=scaler)
    factors = set()
    for call in range(20):
        bad, step = call in (3, 5, 12), loop.sparsifier.step + 1
        twin = densify(copy.deepcopy(loop.model))
        loop.optimizer.zero_grad()
        factors.add(scaler.get_scale())
        (scaler.scale(loop.loss(loop.model, 0, bad=False)) * (math.inf if bad else 1.0)).backward()
        loop.loss(twin, 0, bad=False).backward()
        loop.dense[step] = {name: _by_unit(twin, name, (1, 1)) for name in sparse_layers(loop.model)}
        if not fused:
            scaler.unscale_(loop.optimizer)
            nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
        scaler.step(loop.optimizer)
        scaler.update()
    assert len(factors) > 3
    assert loop.sparsifier.step == 17  # a step that was skipped never was
    assert_seen(loop, {6: [2, 3, 4, 5, 6], 12: [8, 9, 10, 11, 12]})


@pytest.mark.parametrize("kind", ["sampled", "sum"])
@pytest.mark.parametrize("stopped", [1, 4, 5, 6, 9, 12, 13])
def test_a_run_goes_on_bit_for_bit_wherever_it_stopped(stopped: int, kind: Kind) -> None:
    loop, other = Loop(kind, Window(5, 2)), Loop(kind, Window(5, 2))
    bad = {4, 12}
    for step in range(1, stopped + 1):
        loop.one(bad=step in bad)
    plain, tensors = split(loop.sparsifier.state_dict())
    other.model.load_state_dict(copy.deepcopy(loop.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    other.sparsifier.load_state_dict(joined(json.loads(json.dumps(plain)), load(save(tensors))))
    before = len(loop.rule.seen)
    for step in range(stopped + 1, 20):
        loop.one(bad=step in bad)
        other.one(bad=step in bad)
    assert len(other.rule.seen) >= 1
    for (_, one), (_, two) in zip(loop.rule.seen[before:], other.rule.seen, strict=True):
        for name, view in one.items():
            for key in ("sample", "sample_gradient", "active_gradient"):
                a, b = getattr(view, key), getattr(two[name], key)
                assert (a is None and b is None) or torch.equal(a, b)
    assert [loop.updates[step].cost for step in other.updates] == [u.cost for u in other.updates.values()]
    one, two = (each.model.state_dict() for each in (loop, other))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_sums_are_held_just_while_a_window_lasts() -> None:
    loop = Loop("sampled", Window(3))
    assert loop.held() == {}
    for step in range(1, 20):
        loop.one()
        into = {4: 1, 5: 2}.get(step % EVERY, 0)  # the update after the sixth has taken them
        assert {name: found["steps"] for name, found in loop.held().items()} == (
            {"0": into, "2": into} if into else dict.fromkeys(loop.held(), 0)
        )
    assert loop.sparsifier.search.gradients.windows.peak == sum(
        n * (4 + 2 * 4) for n in (round(0.7 * layer.topology.count) for layer in sparse_layers(loop.model).values())
    )


@pytest.mark.parametrize("kind", ["sampled", "last", "sum"])
def test_a_window_ends_where_a_density_schedule_moved_connections(kind: Kind) -> None:
    """It falls every 4 steps from 0 to 13, and after step 13; updates follow every 6 steps."""
    schedule = ScheduleConfig(kind="bump", start=0.0, stop=0.5, every=4)
    loop = Loop(kind, Window(5), sparsity=0.9, schedule=schedule)
    for _ in range(STEPS):
        loop.one()
        if loop.sparsifier.step in (4, 8, 12, 13):
            # Nothing was looked at in vain: what is held was for the update that has just been.
            assert all(found["steps"] == 0 or found["due"] == 12 for found in loop.held().values())
    assert_seen(loop, {6: [5, 6], 12: [9, 10, 11, 12], 18: [14, 15, 16, 17, 18], 24: [20, 21, 22, 23, 24]})
    looked = {step: update.cost.probed["0"][1] // TOKENS for step, update in loop.updates.items() if step % 6 == 0}
    assert looked == {6: 2, 12: 4, 18: 5, 24: 5}


def test_a_rule_without_a_window_holds_nothing() -> None:
    for kind in ("sampled", "last"):
        loop = Loop(kind, Window(1, 3))  # type: ignore[arg-type]
        for _ in range(8):
            loop.one()
            assert loop.held() == {}
        assert loop.sparsifier.search.gradients.windows.peak == 0
        assert_seen(loop, {6: [6]})


def test_a_layer_that_is_changed_or_frozen_begins_anew() -> None:
    loop = Loop("sampled", Window(5))
    layers: dict[str, SparseLinear] = sparse_layers(loop.model)
    for _ in range(3):
        loop.one()
    first = layers["0"].topology
    swap = Swap({"0": first.indices[:2]}, {"0": first.sample_inactive(2, generator(0))})
    prepare_swap(layers, swap, "zero", generator(0)).commit(loop.optimizer)
    layers["2"].values.requires_grad_(False)
    loop.sparsifier.search.arm(4)
    for step in (4, 5, 6):
        x = torch.randn(TOKENS, 24, generator=generator(6, step))
        loop.optimizer.zero_grad()
        loop.model(x).square().mean().backward()
        loop.sparsifier.before_step()
        loop.optimizer.step()
        if step < 6:
            loop.sparsifier.after_step()
            assert {name: found["steps"] for name, found in loop.held().items()} == {"0": step - 3}
    layers["2"].values.requires_grad_(True)
    loop.sparsifier.after_step()
    ((_, views),) = loop.rule.seen
    assert list(views) == ["0"]


def test_a_window_of_an_update_that_does_not_come_is_forgotten() -> None:
    loop = Loop("sampled", Window(4))
    for _ in range(5):
        loop.one()
    state = copy.deepcopy(loop.sparsifier.state_dict())
    assert set(loop.held()) == {"0", "2"}
    other = Loop("sampled", Window(4), rule=Watching("sampled", Window(4), every=20))
    other.model.load_state_dict(copy.deepcopy(loop.model.state_dict()))
    other.sparsifier.load_state_dict(state)
    assert other.held() == {}


def test_layers_under_several_rules_have_windows_of_their_own() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rules = {"2": RiglConfig(every=6, window=6, window_every=2)}
    config = SparsifierConfig(steps=STEPS, topology=GseConfig(every=4, scope="local", window=3), rules=rules)
    sparsifier = Sparsifier(model, optimizer, config)
    spent: dict[int, dict[str, int]] = {}
    for step in range(1, 13):
        optimizer.zero_grad()
        model(torch.randn(TOKENS, 24, generator=generator(5, step))).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        if update := sparsifier.after_step():
            spent[step] = {name: tokens // TOKENS for name, (_, tokens) in update.cost.probed.items()}
    assert spent == {4: {"0": 3}, 6: {"2": 3}, 8: {"0": 3}, 12: {"0": 3, "2": 3}}


def test_what_regenerates_in_a_model_that_prunes_has_a_window_too() -> None:
    rule = Pruning(
        "pruning",
        when=Cubic(0.2, 0.8, 5),
        drop=SmallestMagnitude(),
        scope="local",
        fraction=CosineFraction(0.5),
        grow=LargestGradient("sum", Window(3)),
    )
    model = mlp(sparsity=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=STEPS, sparsity=0.8), rule=rule)
    spent: set[tuple[int, int]] = set()
    for step in range(1, 20):
        optimizer.zero_grad()
        model(torch.randn(TOKENS, 24, generator=generator(5, step))).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        if update := sparsifier.after_step():
            assert update.row["swaps"] > 0
            spent |= {(step, tokens // TOKENS) for _, tokens in update.cost.probed.values()}
    assert spent == {(6, 3), (11, 3), (16, 3)}


@pytest.mark.parametrize("damage", ["name", "shape", "active", "key"])
def test_a_state_that_does_not_fit_is_refused(damage: str) -> None:
    loop = Loop("sampled", Window(4))
    for _ in range(5):
        loop.one()
    state = copy.deepcopy(loop.sparsifier.state_dict())
    sums = state["search"]["windows"]
    match damage:
        case "name":
            sums["nobody"] = sums["0"]
        case "shape":
            sums["0"]["total"] = sums["0"]["total"][1:]
        case "active":
            sums["0"]["units"][:1] = sparse_layers(loop.model)["0"].indices[:1]
        case _:
            sums["0"]["other"] = 1
    with pytest.raises(InputError, match="does not fit rule 'watching'"):
        loop.sparsifier.load_state_dict(state)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_window_of_no_steps_is_refused(every: Any) -> None:
    with pytest.raises(InputError, match="every: must be a number of steps of at least 1"):
        Window(3, every)
    for settings in (GseConfig, RiglConfig, EvolutionConfig):
        with pytest.raises(InputError, match="window_every"):
            settings(window=3, window_every=every)
        with pytest.raises(InputError, match="window"):
            settings(window=every)


def _steps(rule: Rule[Any], horizon: Horizon) -> Iterator[int]:
    return (step for step in range(1, horizon.steps + 1) if rule.due(step, horizon))


@given(every=st.integers(1, 9), length=st.integers(1, 15), n=st.integers(1, 6), start=st.integers(1, 40))
def test_a_window_is_every_nth_step_back_to_the_update_before(every: int, length: int, n: int, start: int) -> None:
    horizon = Horizon(40)
    rule, window = Watching("sampled", Window(length, n), every), Window(length, n)
    upcoming, found = Upcoming(horizon), dict[int, list[int]]()
    for step in range(start, 41):
        due = upcoming.of(rule, step, length)
        if due is not None and window.holds(step, due):
            found.setdefault(due, []).append(step)
    dues = list(_steps(rule, horizon))
    before = dict(zip(dues, [0, *dues], strict=False))
    expected = {}
    for due in dues:
        steps = [step for step in range(due, max(before[due], due - length), -n) if step >= start]
        if steps:
            expected[due] = steps[::-1]
        if start == 1:
            assert len(steps) == window.count(due - before[due], horizon)
    assert found == expected
