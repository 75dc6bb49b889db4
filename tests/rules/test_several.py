"""Several rules in one model, each for layers by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from sparsae.config.load import resolve
from sparsae.config.rules import AnyRule, MicroBatchConfig
from sparsae.config.span import Horizon
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.text import dump
from sparsae.core.cadence import Periodic
from sparsae.core.observation import Observation
from sparsae.core.swap import Swap
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.rules import (
    EvolutionConfig,
    GenerationsConfig,
    GmpConfig,
    MestConfig,
    RiglConfig,
    SetConfig,
    StaticConfig,
    StrategyConfig,
    build_rule,
)
from sparsae.rules.parts.rule import Candidate, NoState, Rule
from sparsae.rules.parts.several import Several
from sparsae.search.sparsifier import Sparsifier
from sparsae.terms.cross_entropy import CrossEntropy, CrossEntropyConfig
from sparsae.train.forecast import count_flops, forecast, untrained
from sparsae.train.run import resume, start
from tests.support.loops import mlp, run_steps, score_of
from tests.support.runs import config_of, rows, stopped_at, weights, write_text

FIRST, SECOND = "0", "2"


def trained(steps: int = 12, **settings: object) -> dict[str, torch.Tensor]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=steps, **settings))  # type: ignore[arg-type]
    run_steps(model, optimizer, sparsifier, steps)
    return {name: layer.topology.indices for name, layer in sparse_layers(model).items()}


def test_each_layer_moves_by_its_own_rule_and_the_others_rest() -> None:
    start = {name: layer.topology.indices for name, layer in sparse_layers(mlp()).items()}
    both = trained(topology=StaticConfig(), rules={SECOND: RiglConfig(every=3)})
    assert torch.equal(both[FIRST], start[FIRST])
    assert not torch.equal(both[SECOND], start[SECOND])
    assert both[SECOND].numel() == start[SECOND].numel()


def test_rules_with_other_cadences_move_at_their_own_steps() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = Several({FIRST: build_rule(RiglConfig(every=4)), "*": build_rule(SetConfig(every=6))})
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=20), rule=rule)
    layers, moved = sparse_layers(model), {}
    for step in range(1, 15):
        before = {name: layer.topology for name, layer in layers.items()}
        run_steps(model, optimizer, sparsifier, 1)
        moved[step] = {name for name, layer in layers.items() if layer.topology is not before[name]}
    assert {step: names for step, names in moved.items() if names} == {
        4: {FIRST}, 6: {SECOND}, 8: {FIRST}, 12: {FIRST, SECOND},
    }  # fmt: skip


def test_an_update_that_waits_is_made_up_for_beside_the_next_ones() -> None:
    """Gradients that are not finite at 4 and 5: the rules that were due at 4 and 5 move after 6, and no other."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = Several({FIRST: build_rule(RiglConfig(every=4)), "*": build_rule(SetConfig(every=5))})
    sparsifier, layers = Sparsifier(model, optimizer, SparsifierConfig(steps=20), rule=rule), sparse_layers(model)
    for step in range(1, 7):
        before = {name: layer.topology for name, layer in layers.items()}
        optimizer.zero_grad()
        (model(torch.randn(4, layers[FIRST].in_features)).sum() * (math.nan if step in (4, 5) else 1.0)).backward()
        sparsifier.before_step()
        if step not in (4, 5):
            optimizer.step()
        sparsifier.after_step()
        moved = {name for name, layer in layers.items() if layer.topology is not before[name]}
        assert moved == ({FIRST, SECOND} if step == 6 else set())
        assert sparsifier.search.waiting is (step in (4, 5))
        if step == 5:
            sparsifier.load_state_dict(sparsifier.state_dict())


def test_one_of_them_may_compare_candidates() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    compared = EvolutionConfig(every=3, stop=0.75, candidates=3, proposer="layerwise")
    same = Several({FIRST: build_rule(compared), SECOND: build_rule(SetConfig(every=2))})
    config = SparsifierConfig(steps=20)
    sparsifier = Sparsifier(model, optimizer, config, rule=same, score=score_of(model))  # type: ignore[arg-type]
    layers, moved, counts = sparse_layers(model), {}, [0]
    updates = []
    for step in range(1, 10):
        before = {name: layer.topology for name, layer in layers.items()}
        run_steps(model, optimizer, sparsifier, 1)
        updates.append(sparsifier.search.state)
        moved[step] = {name for name, layer in layers.items() if layer.topology is not before[name]}
        scored = updates[-1].states[0].running.terms.get("cross_entropy")
        counts.append(scored.count if scored else 0)
    assert {step: names for step, names in moved.items() if names} == {
        2: {SECOND}, 3: {FIRST}, 4: {SECOND}, 6: {FIRST, SECOND}, 8: {SECOND}, 9: {FIRST},
    }  # fmt: skip
    assert [step for step in moved if counts[step] > counts[step - 1]] == [3, 6, 9]
    restored = same.state_from_dict(json.loads(json.dumps(dataclasses.asdict(updates[-1]))))
    assert restored == updates[-1]


@pytest.mark.parametrize(
    ("topology", "rules"),
    [
        (SetConfig(every=4), {"*.attn.*": RiglConfig(every=8)}),
        (SetConfig(every=4), {"*.attn.*": MestConfig(every=6), "*.c_fc": RiglConfig(every=4)}),
        (EvolutionConfig(every=4, candidates=2), {"*.attn.*": StaticConfig(), "*.c_fc": RiglConfig(every=3)}),
        (StaticConfig(), {"*.attn.*": EvolutionConfig(every=4, candidates=3, proposer="rigl")}),
    ],
)
def test_operations_are_planned_as_they_are_counted(
    topology: AnyRule, rules: dict[str, AnyRule], tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text")
    config = config_of(text, tmp_path / "cache", "training.steps=20", "training.accumulation=2", method="static")
    config = config.model_copy(update={"topology": topology, "rules": rules})
    summary = start(config, tmp_path / "run", quiet=True)
    expected, _ = count_flops(config, untrained(config, 300))
    assert expected.parts == summary["train_flops_by_part"]


class Guest(Rule[NoState]):
    """A rule of somebody else's: one candidate, which is scored, and nothing to remember."""

    when = Periodic(4)
    needs = frozenset({"loss"})
    terms = (CrossEntropy(CrossEntropyConfig()),)
    micro_batch = MicroBatchConfig()

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        return [Candidate(Swap({}, {}), "guest")]


def test_a_guest_that_scores_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, tmp_path, method="static")
    one = EvolutionConfig(every=4, candidates=1, selection="elitist", stop=1.0)
    own, _ = count_flops(config.model_copy(update={"topology": one}), untrained(config, 300))
    monkeypatch.setattr("sparsae.train.forecast.build_rule", lambda *_: Guest())
    guests, _ = count_flops(config, untrained(config, 300))
    assert guests.parts["search"] == own.parts["search"] > 0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({FIRST: GmpConfig()}, "prunes"),
        ({"nowhere*": RiglConfig()}, "no sparse layer"),
        ({FIRST: RiglConfig(accumulate="sum"), SECOND: RiglConfig()}, "differ in accumulate"),
        ({FIRST: EvolutionConfig(candidates=2), SECOND: EvolutionConfig(candidates=3)}, "both compare"),
    ],
)
def test_what_cannot_be_together_is_refused(rules: dict[str, object], message: str) -> None:
    model = mlp()
    with pytest.raises(InputError, match=message):
        Sparsifier(
            model,
            torch.optim.AdamW(model.parameters()),
            SparsifierConfig(steps=9, topology=StaticConfig(), rules=rules),  # type: ignore[arg-type]
            score=score_of(model),  # type: ignore[arg-type]
        )


def test_a_run_with_several_rules_resumes_bit_for_bit(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    settings = ['rules={"*.attn.*": {rule: rigl, every: 3}, "*c_fc": {rule: static}}', "training.log_every=1"]
    config = config_of(text, tmp_path / "cache", *settings, method="set")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert config == resolve(tmp_path / "again.yaml")
    start(config, tmp_path / "whole", quiet=True)
    with stopped_at(5):
        assert not start(config, tmp_path / "stopped", quiet=True)["finished"]
    assert resume(tmp_path / "stopped", quiet=True)["finished"]
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    updates = [row["layers"] for row in rows(tmp_path / "whole") if row["kind"] == "topology"]
    moved = {name for layers in updates for name, layer in layers.items() if layer["swaps"]}
    assert any(".attn." in name for name in moved)
    assert any(name.endswith("mlp.c_proj") for name in moved)
    assert not any(name.endswith("c_fc") for name in moved)


def test_rules_can_be_removed_and_go_with_their_method(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(resolve(method="set", overrides=['rules={"a*": {rule: rigl, every: 7}, "b*": {rule: mest}}'])))
    assert set(resolve(file).rules) == {"a*", "b*"}
    for none in ("{}", "null"):
        assert resolve(file, overrides=[f"rules={none}"]).rules == {}
        again = resolve(file, overrides=[f"rules={none}", 'rules={"c*": {rule: rigl}}']).rules
        assert list(again) == ["c*"]
    assert set(resolve(file, overrides=['rules={"a*": null, "nowhere": null}']).rules) == {"b*"}
    assert resolve(file, overrides=['rules={"a*": null}', 'rules={"a*": {rule: rigl}}']).rules["a*"] == RiglConfig()
    for method in ("static", "gmp", "sparsae", "dense"):
        assert resolve(file, method=method).rules == {}
    assert set(resolve(file, method="set").rules) == {"a*", "b*"}
    assert set(resolve(file, preset="tiny").rules) == {"a*", "b*"}


def test_epochs_are_refused_where_no_text_is_read(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path, "rules={'*.attn.*': {rule: rigl, every: 1 epoch}}", method="set")
    with pytest.raises(InputError, match=r"once the text is read.*5%"):
        forecast(config)


def test_a_wrong_setting_of_one_of_them_is_one_line(tmp_path: Path) -> None:
    for rules, message in {
        '{"*": {rule: rigl, evry: 3}}': "rules.*.*evry: no such setting",
        '{"*": {rule: rigll}}': "rules.*rigll",
        '{"*": 3}': "rules",
    }.items():
        with pytest.raises(InputError, match=message.replace(".*.*", ".*")) as caught:
            resolve(overrides=[f"rules={rules}"])
        assert "\n" not in str(caught.value)


def test_a_ramp_in_updates_is_of_each_rules_own_updates() -> None:
    """The steps between updates of two rules are no time for a connection to learn: the longest ramp is for all."""
    ramped = [GenerationsConfig(every=every, ramp="1 update") for every in (100, 101)]
    rules = {"*.attn.*": build_rule(ramped[0]), "*.mlp.*": build_rule(ramped[1]), "*": build_rule(StaticConfig())}
    assert Several(rules).ramp_steps(Horizon(1000)) == 101
    strategy = StrategyConfig(fitness="progress", genes={"ramp": (1.0, 1.1)})
    evolving = build_rule(GenerationsConfig(every=10, ramp="1 update", strategy=strategy))
    both = Several({"*.attn.*": build_rule(SetConfig(every=100, ramp="1 update")), "*": evolving})
    assert both.ramp_in_force(both.initial_state(), Horizon(1000)) == 100
