"""What somebody's rule or term may not do is told in one line that names it, and nothing has moved then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from sparsae import (
    Candidate,
    Decision,
    InputError,
    Observation,
    Periodic,
    Rule,
    Sparsifier,
    SparsifierConfig,
    Swap,
    sparsify,
)
from sparsae.config.rules import RuleConfig, TermConfig
from sparsae.core.observation import PastValues
from sparsae.nn.linear import sparse_layers
from sparsae.registry import RULES
from sparsae.rules import EvolutionConfig, RiglConfig, SetConfig, build_rule
from sparsae.score import Term, Trial
from sparsae.terms.cross_entropy import CrossEntropy, CrossEntropyConfig
from tests.support.loops import mlp, run_steps, score_of

Ask = Callable[[Observation], Any]


class Guest(Rule):
    """Proposes whatever it is given."""

    def __init__(self, ask: Ask | None = None, **attributes: Any) -> None:
        self.when = Periodic(2)
        self._ask = ask
        for name, value in attributes.items():
            setattr(self, name, value)

    def ask(self, observation: Observation, state: Any, rng: torch.Generator) -> Any:
        return self._ask(observation) if self._ask else []


def swap(drop: Any, grow: Any, shrinks: int = 0, rejected: str | None = None) -> Ask:
    """A swap in the first layer: units made of its topology."""

    def ask(observation: Observation) -> list[Candidate]:
        name, view = next(iter(observation.layers.items()))
        made = Swap({name: drop(view.topology)}, {name: grow(view.topology)}, shrinks)
        return [Candidate(made, "guest", rejected)]

    return ask


def first(topology: Any, n: int = 3) -> torch.Tensor:
    return topology.indices[:n]


def free(topology: Any, n: int = 3) -> torch.Tensor:
    return topology.sample_inactive(n, torch.Generator().manual_seed(0))


WRONG: dict[str, tuple[Ask, str]] = {
    "no list": (lambda observation: None, "must return a list of Candidate"),
    "no candidates": (lambda observation: [Swap({}, {})], "must return a list of Candidate"),
    "another layer": (
        lambda observation: [Candidate(Swap({"x": torch.arange(1)}, {}, 1), "guest")],
        "no layer that it",
    ),
    "floats": (swap(first, lambda t: free(t) + 0.5), "int32 or int64"),
    "a list": (swap(lambda t: [0, 1], free), "int32 or int64"),
    "bools": (swap(first, lambda t: torch.ones(3, dtype=torch.bool)), "int32 or int64"),
    "active ones grown": (swap(first, lambda t: t.indices[3:6]), "layer 0: a grown unit is already active"),
    "inactive ones dropped": (swap(free, free), "cannot be made: layer 0"),
    "units twice": (swap(first, lambda t: free(t)[[0, 0, 1]]), "given twice"),
    "units outside": (swap(first, lambda t: torch.arange(3) + t.units), "outside the layer"),
    "units below": (swap(first, lambda t: torch.arange(3) - 5), "outside the layer"),
    "other counts": (swap(first, lambda t: free(t, 2)), "its nnz would change"),
    "a shrinking model": (swap(first, lambda t: free(t, 0), 3), "does not prune .* shrinks"),
    "a growing model": (swap(lambda t: first(t, 0), free, -3), "does not prune .* enlarges"),
    "growth alone": (swap(lambda t: first(t, 0), free), "drops 0 units and grows 3.*its nnz would change"),
}


def made(rule: Any, **settings: Any) -> tuple[Any, Any, Sparsifier]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, Sparsifier(model, optimizer, SparsifierConfig(steps=9), rule=rule, **settings)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_proposal_names_its_rule_and_moves_nothing(what: str) -> None:
    ask, message = WRONG[what]
    parts = made(Guest(ask))
    before = [layer.topology for layer in sparse_layers(parts[0]).values()]
    with pytest.raises(InputError, match=message) as caught:
        run_steps(*parts, 3)
    assert "rule 'guest'" in str(caught.value)
    assert all(a is layer.topology for a, layer in zip(before, sparse_layers(parts[0]).values(), strict=True))


def test_a_swap_outside_the_bounds_is_rejected() -> None:
    def ask(observation: Observation) -> list[Candidate]:
        (one, view), (two, other) = observation.layers.items()
        n = view.topology.count - 1
        return [Candidate(Swap({one: view.topology.indices[:n]}, {two: free(other.topology, n)}), "guest")]

    parts = made(Guest(ask))
    run_steps(*parts, 1)
    x = torch.randn(8, 24)
    parts[0](x).square().mean().backward()
    parts[2].before_step()
    parts[1].step()
    update = parts[2].after_step()
    assert update is not None
    assert not update.accepted
    assert update.row["candidates"][0]["rejected"] == "bounds"


@pytest.mark.parametrize(("index", "rejected"), [(0, "mine"), (7, None)])
def test_a_choice_that_is_none_is_refused(index: int, rejected: str | None) -> None:
    class Chooser(Guest):
        def tell(self, *arguments: Any) -> Any:
            return Decision(index), arguments[-2]

    parts = made(Chooser(swap(first, free, rejected=rejected)))
    with pytest.raises(InputError, match=f"chose candidate {index}"):
        run_steps(*parts, 3)


def test_an_error_inside_a_rule_says_whose_it_is() -> None:
    parts = made(Guest(lambda observation: 1 / 0))
    with pytest.raises(ZeroDivisionError) as caught:
        run_steps(*parts, 3)
    assert caught.value.__notes__ == ["raised by rule 'guest' at the update of step 2"]


@dataclass(frozen=True)
class Unsaved:
    """A state that JSON has no form for."""

    seen: frozenset[int] = frozenset({1})


class Bare(Term[TermConfig]):
    def value(self, trial: Trial) -> float:
        return math.nan


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "unknown needs": ({"needs": frozenset({"gradients"})}, "needs 'gradients'"),
    "a loss for nothing": ({"needs": frozenset({"loss"})}, "no terms"),
    "a loss without a score": (
        {"needs": frozenset({"loss"}), "terms": (CrossEntropy(CrossEntropyConfig()),)},
        "give Sparsifier a score",
    ),
    "needs of a term": ({"terms": (CrossEntropy(CrossEntropyConfig()),)}, "add {'loss'} to the rule's needs"),
    "a term without a label": ({"terms": (Bare(TermConfig()),)}, "no label"),
    "a state that cannot be saved": ({"initial_state": Unsaved}, "cannot be saved as JSON"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_rule_that_cannot_be_served_is_refused_at_once(what: str) -> None:
    attributes, message = UNFIT[what]
    with pytest.raises(InputError, match=message):
        made(Guest(**attributes))


@dataclass(frozen=True)
class Kept:
    """A state of anything."""

    value: Any


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((1, 2), "keep numbers, texts and lists"),
        ({0: 1.0}, "keep numbers, texts and lists"),
        (np.float32(1.0), "cannot be saved as JSON"),
        (torch.ones(1), "cannot be saved as JSON"),
    ],
    ids=str,
)
def test_a_state_that_no_checkpoint_would_give_back_is_refused_at_its_update(value: Any, said: str) -> None:
    class Remembers(Guest):
        def initial_state(self) -> Kept:
            return Kept([math.nan, np.float64(0.5), {"a": True}])

        def tell(self, *arguments: Any) -> Any:
            return Decision(None), Kept(value)

    with pytest.raises(InputError, match=f"rule 'remembers': its state .*{said}"):
        run_steps(*made(Remembers(swap(first, free))), 3)


def test_a_rule_may_make_its_state_what_it_was() -> None:
    class Remembers(Guest):
        def initial_state(self) -> Kept:
            return Kept((1, 2))

        def state_from_dict(self, data: Any) -> Kept:
            return Kept(tuple(data["value"]))

    run_steps(*made(Remembers(swap(first, free))), 3)


def test_a_rule_by_name_may_be_a_frozen_dataclass(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Frozen(Rule):
        when: Periodic = field(default_factory=lambda: Periodic(2))

        def ask(self, observation: Observation, state: Any, rng: torch.Generator) -> Any:
            return []

    class FrozenConfig(RuleConfig):
        """Nothing."""

    monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))
    RULES.register("frozen", FrozenConfig)(lambda config: Frozen())
    assert build_rule(FrozenConfig(ramp=3)).ramp == 3


def test_a_layer_that_was_made_sparse_later_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    parts = made(SetConfig(every=2))
    model = parts[0]
    run_steps(*parts, 2)
    assert "was made sparse after" not in caplog.text
    model.append(sparsify(torch.nn.Sequential(torch.nn.Linear(24, 24)), 0.5))
    run_steps(*parts, 6)
    assert caplog.text.count("was made sparse after Sparsifier was made (1 such layers)") == 1


def test_an_update_is_printed_in_short() -> None:
    found = []
    model, optimizer, sparsifier = made(SetConfig(every=2))
    sparsifier.attach(on_update=found.append)
    for _ in range(2):
        model(torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (update,) = found
    assert repr(update) == f"Update(step=2, accepted=True, swaps={update.record.swaps})"


def test_names_of_rows_are_no_names_of_telemetry() -> None:
    parts = made(Guest(swap(first, free), telemetry=lambda state, progress: {"accepted": 0.0}))
    with pytest.raises(InputError, match="telemetry cannot be called 'accepted'"):
        run_steps(*parts, 3)


def test_a_term_that_is_no_number_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Bare):
        label, unit = "Broken", "nothing"

    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = SparsifierConfig(steps=20, topology=EvolutionConfig(every=2, candidates=2))
    sparsifier = Sparsifier(model, optimizer, config, score=score_of(model))  # type: ignore[arg-type]
    sparsifier.search.rule.terms = (*sparsifier.search.rule.terms, Broken(TermConfig()))
    run_steps(model, optimizer, sparsifier, 9)
    assert sum("is nan, and no such topology is chosen" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("rule", ["rigl", Guest, 3])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(InputError, match="must be a Rule or the settings of one"):
        made(rule)


def test_settings_stand_for_their_rule_and_one_rule_is_for_all_layers() -> None:
    assert made(RiglConfig())[2].search.rule.name == "rigl"
    model = mlp()
    config = SparsifierConfig(steps=9, rules={"0": SetConfig()})
    with pytest.raises(InputError, match="cannot be beside it"):
        Sparsifier(model, torch.optim.AdamW(model.parameters()), config, rule=RiglConfig())


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_past_values_want_a_number_of_steps(steps: Any) -> None:
    with pytest.raises(InputError, match="at least 1"):
        PastValues(steps)


def test_a_window_of_any_length_is_looked_for_in_the_run_alone() -> None:
    parts = made(Guest(swap(first, free), needs=frozenset({PastValues(10**9)})))
    run_steps(*parts, 9)


@pytest.mark.parametrize("key", ["rule", "past", "bounds"])
def test_a_state_that_does_not_fit_is_refused(key: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=9))
    state = sparsifier.state_dict()
    state["search"] = state["search"] | {key: {"3": {"0": torch.zeros(7)}} if key == "past" else {"0": None}}
    with pytest.raises(InputError):
        sparsifier.load_state_dict(state)
