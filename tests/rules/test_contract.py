"""What every registered topology rule keeps, found by the registry alone: those of installed packages take part.

Each rule is tried with its defaults, and once with each other value of every setting that is a choice, and of a window
and a random share where it has them. A setting `every` is made small, so that short trainings have updates.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

from sparsae.config import BurnInConfig, MicroBatchConfig, ParameterizationConfig, RuleConfig, Section, TeacherConfig
from sparsae.config.load import resolve
from sparsae.config.shipped import about, methods
from sparsae.config.span import Horizon
from sparsae.config.sparsifier import TOLD, SparsifierConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.observation import Captured, Observation, PastValues
from sparsae.core.randomness import generator
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.nn.tensors import model_tensors
from sparsae.parameterization import Parameterization
from sparsae.registry import RULES
from sparsae.rules import build_rule
from sparsae.rules.parts.rule import Candidate, Decision, Rule
from sparsae.score import Score
from sparsae.search.sparsifier import Sparsifier
from sparsae.train.forecast import count_flops, untrained
from tests.support.loops import OPTIMIZERS, config_of, frequent, run_steps, score_of

STEPS, EVERY = 40, 4
WIDTH, SPARSITY = 24, 0.8
HEADS = {"0": HeadLayout("out", 12)}
HORIZONS = [Horizon(STEPS), Horizon(1000, epoch=70)]


def choices(section: Section) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each value, but for the default, of every setting of the rule's own that is a choice."""
    for name, setting in type(section).model_fields.items():
        kind, value = setting.annotation, getattr(section, name)
        if isinstance(value, dict) and all(isinstance(inner, Section) for inner in value.values()):
            for key, inner in value.items():
                yield from ((f"{name}.{key}.{choice}", {name: {key: given}}) for choice, given in choices(inner))
        elif isinstance(value, Section) and not isinstance(value, BurnInConfig | MicroBatchConfig):
            yield from ((f"{name}.{choice}", {name: given}) for choice, given in choices(value))
        elif kind is bool or get_origin(kind) is Literal:
            values = (True, False) if kind is bool else get_args(kind)
            yield from ((f"{name}={other}", {name: other}) for other in values if other != value)


def averages(section: Section) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of growth by averaged gradients and by chance."""
    if "window" in type(section).model_fields:
        yield "window=3", {"window": 3, "random_share": 0.0}
        yield "window=100, every 3rd", {"window": 100, "window_every": 3, "random_share": 0.4}
    if "grow_temperature" in type(section).model_fields:
        yield "grow_temperature=1", {"grow_temperature": 1.0, "random_share": 0.0}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {choice}".strip(): (name, given)
    for name in RULES.names()
    for choice, given in [("", {}), *choices(RULES[name].settings()), *averages(RULES[name].settings())]
}
MOVING = [case for case, (name, _) in CASES.items() if build_rule(RULES[name].settings()).moves]
every_rule = pytest.mark.parametrize("name", RULES.names())
every_case = pytest.mark.parametrize("case", CASES)
every_run = pytest.mark.parametrize(("case", "unit"), [(case, unit) for case in CASES for unit in ((1, 1), (4, 4))])


def settings_of(case: str) -> RuleConfig:
    name, given = CASES[case]
    settings = RULES[name].settings.model_validate({**frequent(name, EVERY), **given})
    assert isinstance(settings, RuleConfig)
    return settings


def prepare(case: str, unit: tuple[int, int] = (1, 1)) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    """A small model whose layers and heads are near their bounds."""
    settings = settings_of(case)
    prunes, floor = settings.first_sparsity is not None, 0.1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    start = settings.first_sparsity if settings.first_sparsity is not None else SPARSITY
    sparsify(model, start, unit=unit, heads=HEADS, head_min_density=floor, seed=1)
    optimizer = OPTIMIZERS["ours"](model)
    scored = build_rule(settings).micro_batch is not None
    sparsifier = Sparsifier(
        model,
        optimizer,
        SparsifierConfig.model_validate(
            {
                "steps": STEPS,
                "topology": settings,
                "teacher": TeacherConfig(),
                "sparsity": SPARSITY if prunes else None,
                "min_density": 0.15,
                "max_density": 0.3,
                "head_min_density": floor,
            },
            context=TOLD,  # of one setting at a time, whatever it belongs to
        ),
        score=score_of(model) if scored else None,  # type: ignore[arg-type]
        heads=HEADS,
        parameterization=Parameterization(ParameterizationConfig(), WIDTH, 1),
    )
    return model, optimizer, sparsifier


@dataclass(repr=False)
class Asked:
    """One call of `ask`: what it was given, what it answered, twice, and whether it left everything as it was."""

    observation: Observation
    state: Any
    first: list[Candidate]
    second: list[Candidate]
    growth: Mapping[str, int]
    left_alone: bool


@dataclass(repr=False)
class Run:
    """A training that was watched."""

    rule: Rule[Any]
    asked: list[Asked] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    updates: dict[int, Any] = field(default_factory=dict)
    nnz: list[int] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    telemetry: list[dict[str, float]] = field(default_factory=list)


def tensors_of(observation: Observation) -> list[Tensor]:
    found = []
    for view in observation.layers.values():
        found += [value.clone() for value in vars(view).values() if isinstance(value, Tensor)]
        found.append(view.topology.indices.clone())
    return found


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@functools.cache
def watched(case: str, unit: tuple[int, int]) -> Run:
    """A whole training, each `ask` of which is made twice with the same generator."""
    model, optimizer, sparsifier = prepare(case, unit)
    rule = sparsifier.search.rule
    run, layers, ask = Run(rule), sparse_layers(model), type(rule).ask

    def ask_twice(self: Rule[Any], observation: Observation, state: Any, rng: torch.Generator) -> list[Candidate]:
        before, seed, whole = tensors_of(observation), rng.get_state(), torch.get_rng_state()
        first = ask(self, observation, state, rng)
        rng.set_state(seed)
        second = ask(self, observation, state, rng)
        unread = same(before, tensors_of(observation)) and torch.equal(whole, torch.get_rng_state())
        growth = rule.growth(observation.topologies, state, observation.progress)
        run.asked.append(Asked(observation, state, first, second, growth, unread))
        return second

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rule), "ask", ask_twice)
        for step in range(1, STEPS + 1):
            run.states.append(sparsifier.search.state)
            run.telemetry.append(rule.telemetry(sparsifier.search.state, (step - 1) / STEPS))
            x = torch.randn(8, WIDTH, generator=generator(3, step))
            optimizer.zero_grad()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
            update = sparsifier.after_step()
            if update is not None:
                run.updates[step] = update
            run.nnz.append(sparsifier.nnz)
            run.counts.append({name: layer.topology.count for name, layer in layers.items()})
    return run


@every_rule
def test_a_rule_documents_itself(name: str) -> None:
    settings = RULES[name].settings

    def undocumented(section: type[Section], path: str = "") -> list[str]:
        found = []
        for key, setting in section.model_fields.items():
            kind = setting.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                found += undocumented(kind, f"{path}{key}.")
            elif not setting.description or "\n" in setting.description:
                found.append(path + key)
        return found

    assert issubclass(settings, RuleConfig)
    assert undocumented(settings) == []
    assert RULES[name].title.endswith(".")
    assert name in methods()
    assert about(name)
    assert inspect.getdoc(inspect.getmodule(settings)), f"the file of {name} says nothing of what it implements"


@every_rule
def test_its_settings_are_plain_and_a_method_of_its_name_has_them(name: str) -> None:
    settings = RULES[name].settings()
    assert settings.rule == name
    again = RULES[name].settings.model_validate(json.loads(settings.model_dump_json()))
    assert again == settings
    config = resolve(method=name)
    assert config.topology == settings
    assert not config.teacher.enabled
    assert build_rule(config.topology).name == name


@every_rule
def test_it_moves_in_a_run_of_its_default_settings(name: str) -> None:
    rule, horizon = build_rule(RULES[name].settings()), Horizon(10_000, epoch=1000)
    due = [step for step in range(1, horizon.steps + 1) if rule.due(step, horizon)]
    assert bool(due) == rule.moves
    assert horizon.steps not in due, "a model must not end with connections that never trained"


@every_case
def test_updates_come_when_its_cadence_says_so(case: str) -> None:
    rule = build_rule(settings_of(case))
    for horizon in HORIZONS:
        steps = range(1, horizon.steps + 1)
        due = [step for step in steps if rule.due(step, horizon)]
        assert due == [step for step in steps if rule.when.due(step, horizon)] == list(rule.updates(horizon))
        assert rule.moves or not due


@every_case
def test_what_it_declares_fits_together(case: str) -> None:
    settings = settings_of(case)
    rule = build_rule(settings)
    assert {need for need in rule.needs if not isinstance(need, PastValues)} <= set(get_args(Captured))
    assert ("loss" in rule.needs) == (rule.micro_batch is not None)
    assert rule.prunes == (settings.first_sparsity is not None)
    for horizon in HORIZONS:
        units = [rule.active_units(1000, 200, step, horizon) for step in range(1, horizon.steps + 1)]
        assert units == sorted(units, reverse=True)
        assert units[-1] == (200 if rule.prunes else 1000)


@every_case
def test_its_operations_can_be_planned(case: str) -> None:
    settings = settings_of(case)
    config = config_of("training.steps=40", method="static").model_copy(update={"topology": settings})
    flops, _ = count_flops(config, untrained(config))
    rule = build_rule(settings)
    assert flops.parts["student"] > 0
    assert (flops.parts.get("dense_gradients", 0) > 0) == bool(rule.needs & {"gradient_at", "dense_gradient"})


@every_run
def test_asking_is_pure(case: str, unit: tuple[int, int]) -> None:
    run = watched(case, unit)
    assert [step for step in range(1, STEPS + 1) if run.rule.due(step, HORIZONS[0])] == list(run.updates)
    assert len(run.asked) == len(run.updates)
    for asked in run.asked:
        assert asked.left_alone
        assert [c.proposer for c in asked.first] == [c.proposer for c in asked.second]
        for one, two in zip(asked.first, asked.second, strict=True):
            assert one.rejected == two.rejected
            assert one.swap.shrinks == two.swap.shrinks
            for a, b in ((one.swap.drop, two.swap.drop), (one.swap.grow, two.swap.grow)):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)


@every_run
def test_its_swaps_hold(case: str, unit: tuple[int, int]) -> None:
    run = watched(case, unit)
    for asked in run.asked:
        for candidate in asked.first:
            swap = candidate.swap
            assert swap.size == sum(units.numel() for units in swap.grow.values()) + swap.shrinks
            assert swap.shrinks >= 0 if run.rule.prunes else swap.shrinks == 0
            for name, dropped in swap.drop.items():
                assert bool(asked.observation.layers[name].topology.contains(dropped).all())
                assert dropped.unique().numel() == dropped.numel()
            for name, grown in swap.grow.items():
                topology = asked.observation.layers[name].topology
                assert not bool(topology.contains(grown).any())
                assert grown.unique().numel() == grown.numel()
                assert not grown.numel() or 0 <= int(grown.min()) <= int(grown.max()) < topology.units
                if "dense_gradient" in run.rule.needs:
                    assert grown.numel() <= asked.growth[name]


@every_run
def test_its_candidates_keep_bounds_and_floors(case: str, unit: tuple[int, int]) -> None:
    # What draws again until a candidate fits may give up; everything else chooses inside the limits.
    gives_up = CASES[case][1] == {"bounds": "redraw"}
    for asked in watched(case, unit).asked:
        for candidate in asked.first:
            for name, view in asked.observation.layers.items():
                swap, empty = candidate.swap, view.topology.indices[:0]
                after, _ = view.topology.replace(swap.drop.get(name, empty), swap.grow.get(name, empty))
                assert name != "0" or view.groups
                floors = [int(groups.counts(after.indices).min()) >= groups.least for groups in view.groups]
                holds = view.bounds[0] <= after.count <= view.bounds[1] and all(floors)
                assert holds or (gives_up and candidate.rejected)
            assert gives_up or candidate.rejected is None


@every_run
def test_counts_are_exact_throughout_a_training(case: str, unit: tuple[int, int]) -> None:
    run, size = watched(case, unit), unit[0] * unit[1]
    units = 4 * WIDTH * WIDTH // size
    end = round((1 - SPARSITY) * units)
    if run.rule.prunes:
        start = round((1 - (settings_of(case).first_sparsity or 0.0)) * units)
        assert run.nnz[0] == start * size
        assert run.nnz == sorted(run.nnz, reverse=True)
        for step in run.updates:
            # Rounded in each layer, where each has its own schedule.
            assert abs(run.nnz[step - 1] // size - run.rule.active_units(start, end, step, HORIZONS[0])) <= 1
        assert run.nnz[-1] == end * size
    else:
        assert set(run.nnz) == {end * size}
    assert any(update.accepted for update in run.updates.values()) == run.rule.moves
    probed = [update.cost.probed for update in run.updates.values()]
    for counts, seen in zip([run.counts[step - 2] for step in run.updates], probed, strict=True):
        for name, (weights, tokens) in seen.items():
            declared = run.rule.probed_units(counts[name], units // 2 - counts[name])
            assert 0 < weights <= declared * size
            assert tokens == 8 * run.rule.window.count(EVERY, HORIZONS[0])


@every_run
def test_its_state_survives_json(case: str, unit: tuple[int, int]) -> None:
    run = watched(case, unit)
    for state in [run.rule.initial_state(), *run.states]:
        again = run.rule.state_from_dict(json.loads(json.dumps(dataclasses.asdict(state), allow_nan=False)))
        assert again == state
        assert type(again) is type(state)


@every_run
def test_its_telemetry_is_finite_and_in_the_metrics(case: str, unit: tuple[int, int]) -> None:
    run = watched(case, unit)
    keys = {frozenset(row) for row in run.telemetry}
    assert len(keys) == 1
    for row in run.telemetry:
        assert all(type(value) in (int, float) and math.isfinite(value) for value in row.values())
    for asked, update in zip(run.asked, run.updates.values(), strict=True):
        told = run.rule.telemetry(asked.state, asked.observation.progress)
        assert {key: update.row[key] for key in told} == told
        json.dumps(update.row, allow_nan=False)


@every_case
def test_a_run_goes_on_from_anywhere_bit_for_bit(case: str) -> None:
    parts, others = prepare(case), prepare(case)
    run_steps(*parts, 11)
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    expected = run_steps(*parts, 12)
    for part, state in zip(others, saved, strict=True):
        part.load_state_dict(state)
    assert run_steps(*others, 12) == expected
    tensors, again = model_tensors(parts[0]), model_tensors(others[0])
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert others[2].search.state == parts[2].search.state


@pytest.mark.parametrize("case", MOVING)
def test_it_never_chooses_what_is_rejected_or_scored_with_no_number(case: str) -> None:
    run = watched(case, (1, 1))
    asked = run.asked[0]
    proposed = [*asked.first, *asked.first]
    names = [term.name for term in run.rule.terms]
    nan = dict.fromkeys(names, math.nan)

    def told(candidates: list[Candidate], scores: list[Score | None]) -> Decision:
        current = dict.fromkeys(names, 1.0) if names else None
        return run.rule.tell(candidates, scores, current, asked.state, asked.observation.progress)[0]

    rejected = [dataclasses.replace(candidate, rejected="bounds") for candidate in proposed]
    assert told(rejected, [None] * len(proposed)).chosen is None
    if run.rule.micro_batch and all(candidate.is_scored for candidate in proposed):
        assert told(proposed, [nan] * len(proposed)).chosen is None
        best = [*([nan] * (len(proposed) - 1)), dict.fromkeys(names, 0.5)]
        assert told(proposed, [*best]).chosen == len(proposed) - 1
