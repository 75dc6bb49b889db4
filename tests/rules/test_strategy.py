"""Numbers of a rule that evolve by measured progress: genomes, their credits, and what becomes of an update."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from sparsae.config.load import resolve
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.text import dump
from sparsae.core.observation import LayerView
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.nn.tensors import model_tensors
from sparsae.rules import DamageConfig, GenerationsConfig, SetConfig, StrategyConfig, build_rule
from sparsae.rules.parts.damage import damage_factors
from sparsae.rules.parts.evolved import Evolved
from sparsae.rules.parts.rule import Candidate, Decision
from sparsae.rules.parts.several import Several
from sparsae.rules.parts.shift import shifted
from sparsae.rules.parts.strategy import Gene
from sparsae.search.guests import chosen
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.updates import Update
from sparsae.train.costs import RunCosts
from sparsae.train.forecast import count_flops, untrained
from sparsae.train.run import resume, start
from tests.rules.test_strategy_numbers import (
    strategy_of,
)
from tests.support.loops import OPTIMIZERS, run_steps, score_of
from tests.support.runs import config_of, rows, stopped_at, weights, write_text


def test_what_costs_at_once_and_pays_later_has_its_credit_over_several_updates_alone() -> None:
    """One generation's progress prefers to do little: a change of x costs x, and brings 0.7 x in each of 3 updates."""

    def slope(trial: int, reach: int) -> float:
        # So large a mutation, thrown back, is a uniform draw: the trials' genomes have nothing to do with each other.
        strategy = strategy_of((Gene("x", 0.0, 1.0),), trial=trial, reach=reach, mutation=50.0, memory=1000)
        state, loss, x = strategy.begin(), 0.0, [0.5, 0.5, 0.5]
        for i in range(400):
            x.append(state.genome[0])
            state = strategy.after(state, loss, generator(0, i))
            loss -= 0.7 * sum(x[-4:-1]) - x[-1]
        pairs = torch.tensor([[trial.genome[0], trial.credit] for trial in state.trials], dtype=torch.float64)
        return float(torch.corrcoef(pairs.T)[0, 1])

    assert slope(trial=1, reach=0) < -0.3
    assert slope(trial=4, reach=3) > 0.3


# What an update makes of a genome.

WIDTH, STEPS = 16, 60
SMALL: dict[str, Any] = {
    "genes": {"drop_fraction": (0.1, 0.5), "interval": (1.0, 3.0), "ramp": (0.5, 4.0)},
    "density": {"depth": (0.5, 2.0), "0": (0.8, 1.2)},
    "trial": 3,
    "reach": 3,
    "memory": 3,
}


def parts_of(
    optimizer: str = "ours", steps: int = STEPS, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    sparsify(model, 0.8, seed=1)
    small = {} if settings.get("fitness") == "none" else SMALL
    strategy = StrategyConfig(**{"fitness": "progress", **small, **settings})
    made = OPTIMIZERS[optimizer](model)
    config = SparsifierConfig(steps=steps, topology=GenerationsConfig(every=2, stop=1.0, strategy=strategy))
    return model, made, Sparsifier(model, made, config, score=score_of(model))  # type: ignore[arg-type]


def updates_of(parts: tuple[nn.Module, torch.optim.Optimizer, Sparsifier], steps: int = STEPS - 1) -> list[Update]:
    found, after = [], Sparsifier._after_step

    def watched(self: Sparsifier, stepped: bool = True) -> Update | None:
        if update := after(self, stepped):
            found.append(update)
        return update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sparsifier, "_after_step", watched)
        run_steps(*parts, steps)
    return found


def test_each_row_has_the_genome_in_force_and_its_fitness() -> None:
    parts = parts_of()
    rows = [update.row for update in updates_of(parts)]
    genes = {"gene.drop_fraction", "gene.interval", "gene.ramp", "gene.density.depth", "gene.density.0"}
    assert all(genes <= row.keys() for row in rows)
    losses = [row["current"]["cross_entropy"] for row in rows]
    assert [row["progress"] for row in rows[1:]] == [a - b for a, b in itertools.pairwise(losses)]
    assert "progress" not in rows[0]
    assert len({row["gene.drop_fraction"] for row in rows}) > 3
    for i in range(0, len(rows) - 2, 3):
        assert len({json.dumps([row[key] for key in sorted(genes)]) for row in rows[i : i + 3]}) == 1
    assert any(row["fitness"] for row in rows[2:])
    first = GenerationsConfig()
    assert rows[0]["gene.drop_fraction"] == pytest.approx(first.drop_fraction)
    assert rows[0]["gene.density.depth"] == pytest.approx(1.0)


def test_connections_change_once_in_an_interval_and_every_update_measures() -> None:
    updates = updates_of(parts_of(genes={"interval": (2.0, 3.0)}, density={}, trial=4, reach=2))
    last = 0
    for i, update in enumerate(updates[:20], 1):  # at the end of the cosine nothing is dropped any more
        due = i - last >= update.row["gene.interval"]
        assert update.accepted == due
        assert (update.row["swaps"] > 0) == due
        assert update.cost.forwards == 1
        assert update.cost.backwards == 0
        last = i if due else last
    assert len({update.row["gene.interval"] for update in updates}) == 2


@pytest.mark.parametrize("optimizer", ["ours", "adamw"])
def test_the_ramp_in_force_is_that_of_the_genome(optimizer: str) -> None:
    parts = parts_of(optimizer)
    seen = set()
    for update in updates_of(parts, 30):
        seen.add(update.row["gene.ramp"])
    sparsifier = parts[2]
    genome = sparsifier.search.rule.telemetry(sparsifier.search.state, 0.5)
    assert len(seen) > 2
    assert sparsifier._ramp.steps == max(1, round(2 * genome["gene.ramp"]))
    if optimizer == "ours":
        groups = [group for group in parts[1].param_groups if group["per_weight_step"]]
        assert [group["ramp"] for group in groups] == [sparsifier._ramp.steps]


@pytest.mark.parametrize("optimizer", ["ours", "adamw"])
@pytest.mark.parametrize("fitness", ["progress", "shuffled"])
def test_a_run_goes_on_from_anywhere_bit_for_bit(optimizer: str, fitness: str) -> None:
    settings: dict[str, Any] = {"fitness": fitness, "damage": DamageConfig(every=3)}
    whole, again = (parts_of(optimizer, **settings) for _ in range(2))
    run_steps(*whole, 25)
    saved = [copy.deepcopy(part.state_dict()) for part in whole]
    saved[2]["search"]["rule"] = json.loads(json.dumps(saved[2]["search"]["rule"]))
    expected = run_steps(*whole, 30)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    assert run_steps(*again, 30) == expected
    tensors, others = model_tensors(whole[0]), model_tensors(again[0])
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert whole[2].search.state == again[2].search.state


def test_the_placebo_mutates_alike_and_is_led_by_nothing() -> None:
    real, placebo = (updates_of(parts_of(fitness=fitness)) for fitness in ("progress", "shuffled"))
    genomes = [[update.row["gene.drop_fraction"] for update in updates] for updates in (real, placebo)]
    assert genomes[0][:12] == genomes[1][:12]  # until the first two credits are in, both mutate the rule's own numbers
    assert genomes[0] != genomes[1]
    one, two = resolve(method="sparsae-evolved"), resolve(method="sparsae-placebo")
    assert (one.topology.strategy.fitness, two.topology.strategy.fitness) == ("progress", "shuffled")  # type: ignore[attr-defined]
    differ = set(dump(one).splitlines()) ^ set(dump(two).splitlines())
    assert {line.split(":")[0].strip() for line in differ} == {"method", "fitness"}


def test_the_first_genome_of_the_method_is_the_default() -> None:
    rule, default = build_rule(resolve(method="sparsae-evolved").topology), resolve(method="sparsae").topology
    assert isinstance(rule, Evolved)
    first = rule.telemetry(rule.initial_state(), 0.0)
    assert first["gene.drop_fraction"] == pytest.approx(default.drop_fraction)  # type: ignore[attr-defined]
    assert first["gene.interval"] == 2  # every 1 %, where the default has every 2 %
    assert first["gene.ramp"] == pytest.approx(2.0)
    assert first["gene.density.attention"] == pytest.approx(1.0)


FEWER = "{drop_fraction: [0.1, 0.5], interval: [1, 4], ramp: [1, 4]}"
RUN = ("training.steps=40", "topology.every=2", "topology.strategy.trial=3", "topology.strategy.reach=5",
       "topology.strategy.damage.every=7", "topology.strategy.sequences=2")  # fmt: skip


@pytest.mark.parametrize("method", ["sparsae-evolved", "sparsae-placebo"])
def test_a_run_goes_on_where_it_stopped_and_counts_what_was_planned(method: str, tmp_path: Path) -> None:
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", *RUN, method=method)
    summary = start(config, tmp_path / "whole", quiet=True)
    model = untrained(config, 300)
    expected, counted = count_flops(config, model)[0].parts, summary["train_flops_by_part"]
    assert 0 < counted["dense_gradients"] < expected["dense_gradients"]  # at most, and for every update
    assert counted | {"dense_gradients": 0} == expected | {"dense_gradients": 0}
    due, layers = range(2, 30, 2), len(sparse_layers(model))
    cost = RunCosts(model, config, build_rule(config.topology).micro_batch)
    forward = cost.cost.forward(cost.nnz, 2 * config.model.context)
    assert summary["train_flops_by_part"]["search"] == forward * (len(due) + layers * len(due[6::7]))
    with stopped_at(21):
        start(config, tmp_path / "stopped", quiet=True)
    resume(tmp_path / "stopped", quiet=True)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    measured = [row["current"]["cross_entropy"] for row in rows(tmp_path / "whole") if row.get("current")]
    assert len(measured) == len(due)
    assert len(set(measured)) == len(due)


def test_operations_are_planned_as_they_are_counted(tmp_path: Path) -> None:
    few = f"topology.strategy.genes={FEWER}"
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", *RUN, few, method="sparsae-evolved")
    summary = start(config, tmp_path / "run", quiet=True)
    expected = count_flops(config, untrained(config, 300))[0].parts
    assert expected == summary["train_flops_by_part"]
    assert expected["search"] > 0
    assert expected["dense_gradients"] == 0


@pytest.mark.parametrize("genes", [{"random_share": (0.0, 1.0)}, {"window": (2.0, 8.0), "sample_ratio": (0.5, 2.0)}])
def test_growth_by_gradients_evolves(genes: dict[str, tuple[float, float]]) -> None:
    settings: dict[str, Any] = {"genes": genes, "density": {}, "trial": 2, "reach": 1}
    made: list[tuple[nn.Module, torch.optim.Optimizer, Sparsifier]] = []
    for _ in range(2):
        model, optimizer, _ = parts_of()
        strategy = StrategyConfig(fitness="progress", **settings)
        share = 1.0 if "random_share" in genes else 0.5
        topology = GenerationsConfig(every=6, stop=1.0, window=4, random_share=share, strategy=strategy)
        config = SparsifierConfig(steps=STEPS, topology=topology)
        made.append((model, optimizer, Sparsifier(model, optimizer, config, score=score_of(model))))  # type: ignore[arg-type]
    whole, again = made
    updates = updates_of(whole, 27)  # in the middle of a window
    probed = [sum(weights for weights, _ in update.cost.probed.values()) for update in updates]
    if "random_share" in genes:
        assert [(weights > 0) for weights in probed] == [update.row["gene.random_share"] < 1 for update in updates]
        assert probed[0] == 0 < probed[-1]
    else:
        assert len(set(probed)) > 1
        tokens = {next(iter(update.cost.probed.values()))[1] / 8 for update in updates}
        assert tokens == {min(6, update.row["gene.window"]) for update in updates}
    for part, state in zip(again, [copy.deepcopy(part.state_dict()) for part in whole], strict=True):
        part.load_state_dict(state)
    assert run_steps(*again, 30) == run_steps(*whole, 30)


# Density that moves between layers.


@st.composite
def layers_and_a_swap(draw: st.DrawFn) -> tuple[dict[str, LayerView], Swap]:
    views, drop, grow = {}, {}, {}
    for i in range(draw(st.integers(1, 5))):
        rng = generator(draw(st.integers(0, 2**32)), "layer")
        topology = Topology.random((draw(st.integers(2, 9)), 8), draw(st.integers(1, 12)), rng)
        low = draw(st.integers(1, topology.count))
        high = draw(st.integers(topology.count, topology.units))
        values = torch.randn(topology.count, generator=rng)
        views[f"{i}"] = LayerView(topology, values, (low, high))
        n = draw(st.integers(0, min(topology.count, topology.units - topology.count)))
        if n:
            drop[f"{i}"] = topology.indices[values.abs().argsort()[:n]]
            grow[f"{i}"] = topology.sample_inactive(n, rng)
    return views, Swap(drop, grow)


@given(layers_and_a_swap(), st.lists(st.floats(0.01, 100.0), min_size=5, max_size=5))
def test_a_shift_keeps_the_model_its_bounds_and_the_layers_order(
    case: tuple[dict[str, LayerView], Swap], relative: list[float]
) -> None:
    views, swap = case
    wanted = dict(zip(views, relative, strict=False))
    after = shifted(views, swap, wanted, generator(0, "shift"))
    assert after.size == sum(units.numel() for units in after.grow.values())
    changes = after.count_changes()
    for name, change in changes.items():
        assert views[name].holds(views[name].topology.count + change)
        assert abs(change) <= swap.drop[name].numel()
        kept = swap.drop[name][~torch.isin(swap.drop[name], after.drop[name])]
        assert torch.isin(after.drop[name], swap.drop[name]).all()
        assert torch.isin(after.grow[name], swap.grow[name]).all()
        sizes = dict(zip(views[name].topology.indices.tolist(), views[name].magnitude.tolist(), strict=True))
        if kept.numel() and after.drop[name].numel():
            assert max(sizes[u] for u in after.drop[name].tolist()) <= min(sizes[u] for u in kept.tolist())


def test_layers_go_to_their_first_counts_times_the_factors() -> None:
    parts = parts_of(genes={"drop_fraction": (0.29, 0.31)}, density={"0": (0.7, 0.7001)}, trial=3, reach=1)
    before = {name: layer.topology.count for name, layer in sparse_layers(parts[0]).items()}
    run_steps(*parts, STEPS - 1)
    after = {name: layer.topology.count for name, layer in sparse_layers(parts[0]).items()}
    assert sum(after.values()) == sum(before.values())
    assert after["0"] / after["2"] == pytest.approx(0.7 * before["0"] / before["2"], rel=0.05)


def test_density_goes_where_leaving_out_costs_most() -> None:
    config = DamageConfig(every=1, rate=0.5, limit=2.0)
    factors: dict[str, float] = {}
    for _ in range(3):
        factors |= damage_factors(factors, {"cheap": 0.01, "dear": 0.03, "odd": math.nan, "gain": -1.0}, config)
    assert factors["dear"] == 2.0
    assert 0.5 <= factors["cheap"] < 1.0
    assert factors["gain"] == 0.5
    assert "odd" not in factors
    assert damage_factors({}, {"a": 0.0, "b": -0.1}, config) == {}


def test_damage_is_that_of_a_layer_without_its_weakest_connections() -> None:
    config = DamageConfig(every=3, share=0.5, rate=1.0)
    parts = parts_of(fitness="none", damage=config)
    layers = sparse_layers(parts[0])
    updates = updates_of(parts, 41)
    earlier = dict(parts[2].search.state.damage)
    updates += updates_of(parts, 1)
    assert [update.cost.forwards for update in updates] == [0, 0, 3] * 7
    assert [update.row["current"] is None for update in updates] == [True, True, False] * 7
    row, factors = updates[-1].row, parts[2].search.state.damage
    assert row["chosen"] == 0
    assert [each["proposer"] for each in row["candidates"]] == ["generations", "damage of 0", "damage of 2"]
    assert [each["cross_entropy"] is None for each in row["candidates"]] == [True, False, False]
    costs = [
        (each["cross_entropy"] - row["current"]["cross_entropy"]) / each["swaps"] for each in row["candidates"][1:]
    ]
    assert factors == damage_factors(earlier, dict(zip(("0", "2"), costs, strict=True)), config)
    assert set(factors) == {"0", "2"}
    assert factors != earlier
    first = sum(layer.topology.count for layer in layers.values())
    run_steps(*parts, 30)
    assert sum(layer.topology.count for layer in layers.values()) == first


def test_a_probe_is_never_chosen() -> None:
    rule = build_rule(SetConfig())
    probe = Candidate(Swap({"0": torch.tensor([1])}, {"0": torch.tensor([2])}), "probe", is_probe=True)
    assert rule.tell([probe], [None], None, rule.initial_state(), 0.1)[0].chosen is None
    with pytest.raises(InputError, match="chose candidate 0, which is a probe"):
        chosen(rule, Decision(0), [probe])
    with pytest.raises(InputError, match="a note of its decision cannot be called 'step'"):
        chosen(rule, Decision(None, notes={"step": 1.0}), [probe])


def test_beside_another_rule_it_evolves_for_its_own_layers() -> None:
    model, optimizer, _ = parts_of()
    strategy = StrategyConfig(fitness="progress", trial=3, reach=1, genes={"drop_fraction": (0.1, 0.5)},
                              damage=DamageConfig(every=2))  # fmt: skip
    mine = build_rule(GenerationsConfig(every=2, stop=1.0, strategy=strategy))
    rule = Several({"0": build_rule(SetConfig(every=2, ramp="1 update")), "*": mine})
    config = SparsifierConfig(steps=STEPS)
    sparsifier = Sparsifier(model, optimizer, config, rule=rule, score=score_of(model))  # type: ignore[arg-type]
    before = {name: layer.topology for name, layer in sparse_layers(model).items()}
    updates = updates_of((model, optimizer, sparsifier), 20)
    assert all(update.row["chosen"] == 0 for update in updates)
    assert [update.cost.forwards for update in updates] == [1, 2] * 5
    assert len({update.row["gene.drop_fraction"] for update in updates}) == 4
    assert all(layer.topology is not before[name] for name, layer in sparse_layers(model).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"genes": {"drop_rate": (0.1, 0.5)}}, "drop_rate is no number of rule generations"),
        ({"genes": {"stop": (0.1, 0.5)}}, "stop is no number of rule generations that can evolve"),
        ({"genes": {"drop_fraction": (0.5, 0.1)}}, "the least and the most"),
        ({"genes": {"drop_fraction": (0.5, 1.5)}}, "must be at most 1, not 1.5"),
        ({"genes": {"interval": (0.5, 2.0)}}, "at least 1 update"),
        ({"genes": {"interval": (1.0, 9.0)}}, "at least two changes"),
        ({"genes": {"ramp": (0.0, 2.0)}}, "above 0"),
        ({"genes": {}, "density": {}}, "nothing could evolve"),
        ({"density": {"mlp": (0.0, 1.0)}}, "above 0"),
    ],
)
def test_what_cannot_evolve_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationsConfig.model_validate({"strategy": {"fitness": "progress", **settings}})


def test_layers_that_are_not_there_and_missing_scores_are_told() -> None:
    with pytest.raises(InputError, match=r"no sparse layer matches '\*.attn"):
        parts_of(density={"*.attn.*": (0.5, 2.0)})
    model, optimizer, _ = parts_of()
    strategy = StrategyConfig(fitness="progress")
    with pytest.raises(InputError, match="give Sparsifier a score function"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=9, topology=GenerationsConfig(strategy=strategy)))


def test_a_range_without_a_whole_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"strategy.genes.interval: no whole number lies between 1.2 and 1.4"):
        GenerationsConfig(strategy=StrategyConfig(fitness="progress", genes={"interval": (1.2, 1.4)}))
