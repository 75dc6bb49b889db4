"""Another rule in the middle of a run, the end of a search, and models that changed behind a Sparsifier's back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsae.config.rules import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.cadence import Periodic
from sparsae.core.heads import HeadLayout
from sparsae.errors import InputError
from sparsae.kernels import probe
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.rules import EvolutionConfig, GmpConfig, RiglConfig, SetConfig, StaticConfig
from sparsae.rules.parts.drop import SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import RandomGrowth
from sparsae.search.sparsifier import Sparsifier
from tests.nn.test_state_dict import assert_same
from tests.support.loops import OPTIMIZERS, mlp, run_steps, score_of

BURNING = EvolutionConfig.model_validate({"every": 4, "burn_in": {"steps": 3}, "proposer": "shift"})
RULES: dict[str, tuple[RuleConfig, float | None]] = {
    "static": (StaticConfig(), None),
    "set": (SetConfig(every=4), None),
    "rigl": (RiglConfig(every=4), None),
    "evolution": (BURNING, None),
    "gmp": (GmpConfig(every=4, start=0.0, stop=0.9), 0.9),
}
STEPS = 40


def made(
    rule: str = "set", name: str = "ours", teacher: bool = False, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    model = mlp()
    optimizer = OPTIMIZERS[name](model)
    topology, sparsity = RULES[rule]
    kept = TeacherConfig(enabled=teacher)
    config = SparsifierConfig(steps=STEPS, topology=topology, sparsity=sparsity, teacher=kept, **settings)
    return model, optimizer, Sparsifier(model, optimizer, config, score=score_of(model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        *((before, after, "ours") for before in RULES if before != "gmp" for after in RULES),
        *(("evolution", after, name) for after in RULES for name in OPTIMIZERS if name != "ours"),
    ],
)
def test_from_then_on_it_is_a_sparsifier_of_the_other_rule(before: str, after: str, name: str) -> None:
    """Step 17 comes after an accepted update, in a burn-in, with the probes of no update, and with unequal layers."""
    model, optimizer, sparsifier = made(before, name)
    run_steps(model, optimizer, sparsifier, 17)
    topology, sparsity = RULES[after]
    sparsifier.set_rule(topology, sparsity=sparsity)
    assert not sparsifier.burning_in
    other = mlp()
    other.load_state_dict(model.state_dict())
    other_optimizer = OPTIMIZERS[name](other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = Sparsifier(
        other,
        other_optimizer,
        SparsifierConfig(steps=STEPS, topology=topology, sparsity=sparsity),
        score=score_of(other),  # type: ignore[arg-type]
    )
    fresh.step = 17
    fresh.search.arm(18)
    assert run_steps(model, optimizer, sparsifier, 22) == run_steps(other, other_optimizer, fresh, 22)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


def test_one_run_through_all_rules(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, sparsifier = made("static", teacher=True)
    start = {name: layer.topology for name, layer in sparse_layers(model).items()}
    teacher, telemetry = sparsifier.teacher, sparsifier.search.telemetry
    units = sum(topology.units for topology in start.values())
    updates: list[Any] = []
    sparsifier.attach(updates.append)
    rules = [RULES["set"], RULES["rigl"], RULES["evolution"], RULES["gmp"], (SetConfig(every=4, stop=1.0), None)]
    for topology, sparsity in rules:
        sparsifier.set_rule(topology, sparsity=sparsity)
        for step in range(7):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
    assert sparsifier.step == 35
    assert [update.row["step"] for update in updates] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert sparsifier.teacher is teacher
    assert sparsifier.search.telemetry is telemetry
    # What the model began with is still known.
    now = {name: layer.topology for name, layer in sparse_layers(model).items()}
    dropped = sum(int((~start[name].contains(t.indices)).sum()) for name, t in now.items())
    row = sparsifier.search.initial_row()
    assert row.hamming_start == pytest.approx(dropped / sum(t.count for t in now.values()))
    assert round(0.1 * units) <= sparsifier.nnz < round(0.2 * units)
    assert not caplog.records


def test_a_rule_of_ones_own() -> None:
    rule = Exchange(
        "mine", when=Periodic(3), fraction=CosineFraction(0.2), drop=SmallestMagnitude(), grow=RandomGrowth()
    )
    model, optimizer, sparsifier = made("rigl")
    run_steps(model, optimizer, sparsifier, 5)
    sparsifier.set_rule(rule)
    run_steps(model, optimizer, sparsifier, 5)
    state = sparsifier.state_dict()
    assert state["rule"] == "mine"
    again = Sparsifier(model, optimizer, sparsifier.config, rule=rule)
    again.load_state_dict(state)
    with pytest.raises(InputError, match="the state is of rule 'mine', not of 'rigl'"):
        Sparsifier(model, optimizer, sparsifier.config).load_state_dict(state)


@pytest.mark.parametrize(
    ("rule", "sparsity", "match"),
    [
        (GmpConfig(), None, "'gmp' prunes: set the sparsity where it ends"),
        (GmpConfig(), 0.5, "'gmp' prunes to sparsity 0.5: the model is sparser already"),
        (RiglConfig(), 0.9, "'rigl' keeps the model's sparsity: leave out sparsity 0.9"),
        (EvolutionConfig(initialization="normal"), None, "initialization 'normal'"),
        ("rigl", None, r"rule: must be a Rule or the settings of one, such as SetConfig\(\), not 'rigl'"),
        (GmpConfig(), 1.5, "sparsity"),
    ],
)
def test_what_is_refused_changes_nothing(rule: Any, sparsity: float | None, match: str) -> None:
    tried, other = made("evolution"), made("evolution")
    for each in (tried, other):
        run_steps(*each, 15)  # an update is armed, in a burn-in
    before, config = copy.deepcopy(tried[2].state_dict()), tried[2].config
    with pytest.raises(InputError, match=match):
        tried[2].set_rule(rule, sparsity=sparsity)
    assert_same(tried[2].state_dict(), before)
    assert tried[2].config is config
    assert run_steps(*tried, 9) == run_steps(*other, 9)


def test_frozen_layers_optimizers_and_missing_scores_are_refused_as_in_the_constructor() -> None:
    model, optimizer, sparsifier = made("static")
    no_scores = Sparsifier(model, optimizer, sparsifier.config)
    with pytest.raises(InputError, match="elitist"):
        no_scores.set_rule(EvolutionConfig(selection="elitist"))
    sparsifier.set_rule(EvolutionConfig(selection="elitist"))
    for layer in sparse_layers(model).values():
        layer.values.requires_grad_(False)
    with pytest.raises(InputError, match="every sparse layer is frozen"):
        no_scores.set_rule(SetConfig())
    other = mlp()
    lbfgs = Sparsifier(other, torch.optim.LBFGS(other.parameters()), SparsifierConfig(steps=9, topology=StaticConfig()))
    with pytest.raises(InputError, match="LBFGS cannot follow"):
        lbfgs.set_rule(SetConfig())


def test_no_probe_of_the_old_rule_is_left() -> None:
    model, optimizer, sparsifier = made("rigl")
    run_steps(model, optimizer, sparsifier, 3)
    assert all(probe.open_probe(layer.key) is not None for layer in sparse_layers(model).values())
    sparsifier.set_rule(SetConfig(every=4))
    assert all(probe.open_probe(layer.key) is None for layer in sparse_layers(model).values())
    run_steps(model, optimizer, sparsifier, 4)
    sparsifier.set_rule(RiglConfig(every=4))
    assert sparsifier.update_due
    assert all(probe.open_probe(layer.key) is not None for layer in sparse_layers(model).values())
    sparsifier.close()
    assert all(probe.open_probe(layer.key) is None for layer in sparse_layers(model).values())


def test_a_sparsifier_that_was_closed_does_nothing_more() -> None:
    model, optimizer, sparsifier = made(teacher=True)
    sparsifier.attach()
    model(torch.ones(2, 24)).sum().backward()
    optimizer.step()
    sparsifier.close()
    sparsifier.close()
    optimizer.step()
    assert sparsifier.step == 1
    calls: list[Callable[[], Any]] = [sparsifier.before_step, sparsifier.after_step, sparsifier.attach]
    for call in (*calls, lambda: sparsifier.set_rule(SetConfig())):
        with pytest.raises(InputError, match=r"\(\) of a Sparsifier that was closed: make another one"):
            call()
    Sparsifier(model, optimizer, sparsifier.config).attach()


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("rule", ["static", "set", "rigl"])
def test_a_model_that_was_made_dense_behind_its_back(rule: str, attached: bool, again: bool) -> None:
    """Whatever the rule, whoever calls, and though there are sparse layers of the same names again."""
    model, optimizer, sparsifier = made(rule, "adamw", teacher=True)
    if attached:
        sparsifier.attach()
    densify(model)
    if again:
        sparsify(model, 0.8)
        assert all(isinstance(model[int(i)], SparseLinear) for i in "02")  # type: ignore[index]
    model(torch.ones(2, 24)).sum().backward()
    with pytest.raises(
        InputError, match=r"layer 0 was replaced in the model.*make another.*close\(\) this one"
    ) as caught:
        (optimizer.step if attached else sparsifier.before_step)()
    assert "\n" not in str(caught.value)
    assert sparsifier.step == 0
    sparsifier.close()
    optimizer.step()
    assert sparsifier.teacher is not None
    with pytest.raises(InputError, match=r"layer 0 was made sparse or dense|does not have the student's topology"):
        sparsifier.teacher.update(model, 1)


def test_limits_of_heads_and_neurons_hold_for_the_new_rule_too() -> None:
    """A rule that prunes counts on fewer units than there were: where they could not be kept it is refused."""

    def begun(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        sparsify(model, 0.75, budget="uniform", **settings)
        optimizer = OPTIMIZERS["sgd"](model)
        config = SparsifierConfig(steps=STEPS, topology=SetConfig(every=4), budget="uniform", **_limits(settings))
        return model, optimizer, Sparsifier(model, optimizer, config, heads=settings.get("heads"))

    def _limits(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key != "heads"}

    model, optimizer, sparsifier = begun(fan_in=(1.0, 1.0))
    run_steps(model, optimizer, sparsifier, 10)
    sparsifier.set_rule(GmpConfig(every=4, start=0.0, stop=0.9), sparsity=0.875)
    run_steps(model, optimizer, sparsifier, 29)
    assert sparsifier.nnz == round(0.125 * 2 * 24 * 48)
    for layer, fan in zip(sparse_layers(model).values(), (3, 6), strict=True):
        assert set(layer.topology.to_mask().sum(1).tolist()) == {fan}

    _, _, sparsifier = begun(heads={"0": HeadLayout("out", 8)}, head_min_density=0.2)
    before = copy.deepcopy(sparsifier.state_dict())
    with pytest.raises(InputError, match=r"head_min_density 0\.2 needs"):
        sparsifier.set_rule(GmpConfig(), sparsity=0.9)
    assert_same(sparsifier.state_dict(), before)
    sparsifier.set_rule(GmpConfig(), sparsity=0.78)
