"""The ramp of grown connections' learning rates: AdamW's own, and that after other optimizers' steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparse_layers, sparsify
from sparsae.config.load import resolve
from sparsae.config.span import Horizon
from sparsae.errors import InputError
from sparsae.registry import RULES
from sparsae.rules import GenerationsConfig, GmpConfig, RiglConfig, SetConfig, StaticConfig, StrategyConfig, build_rule

OPTIMIZERS = {
    "sparsae": lambda model: AdamW(model.parameters(), lr=0.05, weight_decay=0.1, per_weight_step=True),
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
}


@given(
    ramp=st.integers(1, 9),
    first=st.booleans(),
    born=st.lists(st.integers(0, 7), min_size=3, max_size=3),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_adamw_ramps_each_weight_by_its_age(ramp: int, first: bool, born: list[int], decay: float) -> None:
    """Against Adam by hand, a weight at a time; weight decay is not ramped."""
    values = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = AdamW([{"params": [values], "per_weight_step": True}], lr=0.1, betas=(0.9, 0.95), weight_decay=decay)
    optimizer.param_groups[0] |= {"ramp": ramp, "ramp_first": first}
    expected, moments, ages = values.detach().tolist(), [[0.0, 0.0] for _ in born], [0, 0, 0]
    for step in range(8):
        for i, at in enumerate(born):
            if step == at > 0:
                expected[i], moments[i], ages[i] = 0.0, [0.0, 0.0], 0
                values.data[i] = 0.0
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    optimizer.state[values][key][i] = 0
        values.grad = torch.tensor([0.3, -0.7, step - 3.5], dtype=torch.float64)
        for i, gradient in enumerate(values.grad.tolist()):
            ages[i] += 1
            moments[i] = [
                0.9 * moments[i][0] + 0.1 * gradient,
                0.95 * moments[i][1] + 0.05 * gradient**2,
            ]
            m, v = moments[i][0] / (1 - 0.9 ** ages[i]), moments[i][1] / (1 - 0.95 ** ages[i])
            share = 1.0 if born[i] == 0 and not first else min(1.0, ages[i] / ramp)
            if born[i] > step and not first:
                share = 1.0  # one of the first weights, which is dropped later
            expected[i] = expected[i] * (1 - 0.1 * decay) - 0.1 * share * m / (v**0.5 + 1e-8)
        optimizer.step()
        assert values.detach().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_young_connection_learns_at_its_share_with_any_optimizer(name: str) -> None:
    """Beside the same step of a copy without a ramp: what is young moves by its share of it, its weight decay aside."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), 0.5, seed=1)
    optimizer = OPTIMIZERS[name](model)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology=SetConfig(every=4, ramp=6)))
    layer, decay, seen = sparse_layers(model)["0"], 0.0 if name == "sgd" else 0.005, set()
    age = torch.full((layer.topology.count,), 99)
    for step in range(20):
        model.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        before, whole, topology = layer.values.detach().clone(), _stepped(model, optimizer), layer.topology
        sparsifier.before_step()
        optimizer.step()
        update = sparsifier.after_step()
        age += 1
        start, share = before * (1 - decay), (age / 6).clamp(max=1.0)
        expected = start + (whole - start) * share
        seen |= set(age.tolist())
        change = update.changes.get("0") if update else None
        if change is None:
            torch.testing.assert_close(layer.values.detach(), expected, rtol=1e-5, atol=1e-7)
            continue
        stayed = change.source >= 0
        torch.testing.assert_close(layer.values.detach()[stayed], expected[change.source[stayed]], rtol=1e-5, atol=1e-7)
        assert step % 4 == 3
        assert topology is not layer.topology
        age = torch.where(stayed, age[change.source.clamp(min=0)], 0)
    assert {1, 2, 3, 6} <= seen


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Values of the first layer after the optimizer's step without a ramp, made on a copy."""
    other = copy.deepcopy(model)
    made = type(optimizer)(other.parameters(), lr=0.05)
    made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in made.param_groups:
        group["ramp"] = 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad
    made.step()
    return sparse_layers(other)["0"].values.detach().clone()


def test_lengths_in_updates_follow_the_rule() -> None:
    horizon = Horizon(1000)
    assert build_rule(SetConfig(every="5%", ramp="2 updates")).ramp_steps(horizon) == 100
    assert build_rule(GenerationsConfig()).ramp_steps(horizon) == 20
    assert build_rule(RiglConfig(ramp="3%")).ramp_steps(horizon) == 30
    assert build_rule(SetConfig()).ramp_steps(horizon) == 0


@pytest.mark.parametrize("name", [name for name in RULES.own_names() if build_rule(RULES[name].settings()).grows])
def test_a_rule_without_scores_keeps_its_ramp(name: str) -> None:
    rule = build_rule(RULES[name].settings(ramp=7, ramp_first=True)).without_scores()
    assert (rule.ramp, rule.ramp_first) == (7, True)


@pytest.mark.parametrize("ramp", [-1, 2.5, True, "0 updates", "two updates", "110%", ""])
def test_a_wrong_ramp_is_one_line(ramp: object) -> None:
    with pytest.raises(InputError) as error:
        resolve(None, None, "set", trees=[({"topology": {"ramp": ramp}}, "here")])
    assert "topology" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [StaticConfig(ramp=5), GmpConfig(ramp=5)])
def test_a_rule_that_grows_nothing_has_no_ramp_of_grown_connections(config: StaticConfig | GmpConfig) -> None:
    with pytest.raises(InputError, match="grows no connection"):
        build_rule(config)
    assert build_rule(config.model_copy(update={"ramp_first": True})).ramp == 5


@pytest.mark.parametrize("name", ["torch", "sparsae"])
def test_a_ramp_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Stopped in the middle of a ramp, and resumed: the same values, bit for bit."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        torch.manual_seed(0)
        model = sparsify(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), 0.5, seed=1)
        optimizer = OPTIMIZERS[name](model)
        config = SparsifierConfig(steps=40, topology=SetConfig(every=4, ramp=6))
        return model, optimizer, Sparsifier(model, optimizer, config)

    def train(parts: tuple[nn.Module, torch.optim.Optimizer, Sparsifier], steps: range) -> None:
        model, optimizer, sparsifier = parts
        for step in steps:
            model.zero_grad()
            model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
            sparsifier.after_step()

    whole, first, second = make(), make(), make()
    train(whole, range(15))
    train(first, range(10))
    for part, other in zip(first, second, strict=True):
        other.load_state_dict(part.state_dict())
    train(second, range(10, 15))
    for layer, other in zip(*(sparse_layers(parts[0]).values() for parts in (whole, second)), strict=True):
        assert torch.equal(layer.indices, other.indices)
        assert torch.equal(layer.values, other.values)


def test_sparse_values_have_a_rate_of_their_own() -> None:
    """Their decay, which is independent of rates, stays."""
    from sparsae.train.assemble import optimizer_of
    from sparsae.train.model import model_of

    def rates(**training: float) -> dict[str, tuple[float, float]]:
        config = resolve(
            None, None, "set", trees=[({"training": training, "model": {"vocab_size": 64, "width": 32}}, "here")]
        )
        model = model_of(config, 64, 0, torch.device("cpu"))
        names = {id(p): name for name, p in model.named_parameters()}
        groups = optimizer_of(model, config).param_groups
        return {names[id(p)]: (g["lr"], g["lr"] * g["weight_decay"]) for g in groups for p in g["params"]}

    plain, own = rates(), rates(sparse_learning_rate=0.02)
    assert {name for name in own if own[name] != plain[name]} == {name for name in own if name.endswith(".values")}
    for name in own:
        factor = 10 if name.endswith(".values") else 1
        assert own[name] == pytest.approx((plain[name][0] * factor, plain[name][1]))


@pytest.mark.parametrize("name", ["sparsae", "torch", "sgd"])
def test_nothing_moves_or_ages_in_a_step_that_the_optimizer_skipped(name: str) -> None:
    """As a gradient scaler skips one whose gradients are not finite; weight decay is no exception."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 12)), 0.5, seed=1)
    optimizer = OPTIMIZERS[name](model)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology=SetConfig(every=3, ramp=9)))
    for step in range(5):
        model.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        sparsifier.before_step()
        if step < 4:
            optimizer.step()
            sparsifier.after_step()
    (layer,) = sparse_layers(model).values()
    before, ages = layer.values.detach().clone(), {name: age.clone() for name, age in sparsifier._ramp.ages.items()}
    sparsifier.after_step()
    assert torch.equal(layer.values, before)
    assert all(torch.equal(sparsifier._ramp.ages[name], age) for name, age in ages.items())


def _moves(parts: tuple[nn.Module, torch.optim.Optimizer, Sparsifier], steps: int) -> list[float]:
    """How far the first layer's values move in each step, on average."""
    model, optimizer, sparsifier = parts
    layer, found = sparse_layers(model)["0"], []
    for _ in range(steps):
        model.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(sparsifier.step))
        model(x).square().mean().backward()
        sparsifier.before_step()
        before = layer.values.detach().clone()
        optimizer.step()
        sparsifier.after_step()
        found.append(float((layer.values.detach() - before).abs().mean()))
    return found


def _ramped(name: str, rule: SetConfig) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), 0.5, seed=1)
    optimizer = OPTIMIZERS[name](model)
    return model, optimizer, Sparsifier(model, optimizer, SparsifierConfig(steps=1000, topology=rule))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_ramp_that_a_later_rule_brings_holds_no_trained_connection_back(name: str, first: bool) -> None:
    """Nor does one that comes back after a rule without: nothing has moved, so all steps are those of no ramp."""
    plain = _ramped(name, SetConfig(every=500))
    expected = _moves(plain, 60)
    parts = _ramped(name, SetConfig(every=500, ramp=0 if first else 30))
    found = _moves(parts, 30)
    parts[2].set_rule(SetConfig(every=500))
    found += _moves(parts, 10)
    parts[2].set_rule(SetConfig(every=500, ramp=30, ramp_first=first))
    found += _moves(parts, 20)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_ramp_goes_on_under_another_rule(name: str) -> None:
    """What was grown under the rule before is as old as it was."""
    whole, parts = (_ramped(name, SetConfig(every=20, ramp=40)) for _ in range(2))
    expected = _moves(whole, 35)
    found = _moves(parts, 30)
    parts[2].set_rule(SetConfig(every=20, ramp=40))
    assert (found + _moves(parts, 5))[:-1] == pytest.approx(expected[:-1], rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_ramp_that_evolves_needs_none_at_first(name: str) -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), 0.5, seed=1)
    optimizer = OPTIMIZERS[name](model)
    strategy = StrategyConfig(fitness="progress", genes={"ramp": (3.0, 4.0)})
    config = SparsifierConfig(steps=400, topology=GenerationsConfig(every=10, ramp=0, strategy=strategy))
    sparsifier = Sparsifier(model, optimizer, config, score=lambda step: model(torch.ones(2, 16)).square().mean())
    parts = model, optimizer, sparsifier
    _moves(parts, 10)
    layer, grown = sparse_layers(model)["0"], sparse_layers(model)["0"].values == 0
    assert bool(grown.any())
    before = layer.values.detach().clone()
    _moves(parts, 1)
    moved = (layer.values.detach() - before).abs()
    if name != "sgd":  # Adam's first step is at most the rate
        assert 0 < float(moved[grown].max()) < 0.05 / 25
    assert bool(sparsifier.state_dict()["ramp"]) == (name != "sparsae")


def test_two_sparsifiers_keep_their_ramps_apart() -> None:
    def parts(together: bool) -> tuple[nn.Module, AdamW]:
        model = sparsify(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), 0.5, seed=1)
        both = parameter_groups(model, 0.0) if together else [g for part in model for g in parameter_groups(part, 0.0)]
        return nn.ModuleList(nn.Sequential(part) for part in model), AdamW(both, lr=0.05)

    def ramps(optimizer: AdamW) -> list[int]:
        return [group["ramp"] for group in optimizer.param_groups if group["per_weight_step"]]

    model, optimizer = parts(together=False)
    Sparsifier(model[0], optimizer, SparsifierConfig(steps=100, topology=SetConfig(every=10, ramp=50)))
    Sparsifier(model[1], optimizer, SparsifierConfig(steps=100, topology=SetConfig(every=10)))
    assert ramps(optimizer) == [50, 0]
    model, optimizer = parts(together=True)
    first = Sparsifier(model[0], optimizer, SparsifierConfig(steps=100, topology=SetConfig(every=10, ramp=50)))
    with pytest.raises(InputError, match=r"share a group .* another ramp \(50 steps, not 0\): give them"):
        Sparsifier(model[1], optimizer, SparsifierConfig(steps=100, topology=SetConfig(every=10)))
    assert ramps(optimizer) == [50]
    same = SparsifierConfig(steps=100, topology=SetConfig(every=10, ramp=50))
    second = Sparsifier(model[1], optimizer, same, score=lambda step: model[1](torch.ones(2, 12)).square().mean())
    evolving = StrategyConfig(fitness="progress", genes={"ramp": (1.0, 3.0)})
    for rule in (
        SetConfig(every=5, ramp=6),
        SetConfig(every=5, ramp=50, ramp_first=True),
        GenerationsConfig(every=10, ramp=50, strategy=evolving),
    ):
        with pytest.raises(InputError, match="have another ramp"):
            second.set_rule(rule)
        assert (second.config, second.search.rule.ramp, ramps(optimizer)) == (same, 50, [50])  # nothing has changed
    first.close()
    second.set_rule(SetConfig(every=5, ramp=6))
    assert ramps(optimizer) == [6]


@pytest.mark.parametrize("name", ["torch", "sgd"])
def test_ages_are_handed_over_to_a_ramp_of_the_first_connections_too_or_of_grown_ones_alone(name: str) -> None:
    parts = _ramped(name, SetConfig(every=20, ramp=400))
    _moves(parts, 25)
    young = parts[2].state_dict()["ramp"]["0"] < 20
    assert 0 < int(young.sum()) < young.numel()
    parts[2].set_rule(SetConfig(every=20, ramp=400, ramp_first=True))
    ages = parts[2].state_dict()["ramp"]["0"]
    assert set(ages[young].tolist()) == {5}
    assert set(ages[~young].tolist()) == {25}
    parts[2].set_rule(SetConfig(every=20, ramp=400))
    ages = parts[2].state_dict()["ramp"]["0"]
    assert set(ages[young].tolist()) == {5}
    assert int(ages[~young].min()) > 400
