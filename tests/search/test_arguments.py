"""What a Sparsifier, a rule's parts and an optimizer are given by mistake: one line that says what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsae.config.span import Horizon
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.cadence import Cubic, Once, Periodic
from sparsae.core.heads import HeadLayout
from sparsae.core.observation import LayerView
from sparsae.errors import InputError
from sparsae.optim import AdamW, parameter_groups
from sparsae.parameterization import Parameterization, initialize
from sparsae.registry import RULES
from sparsae.rules import EvolutionConfig, RiglConfig, SetConfig, build_rule
from sparsae.rules.parts.drop import Drop, SmallestMagnitude
from sparsae.rules.parts.exchange import CosineFraction, Exchange
from sparsae.rules.parts.grow import RandomGrowth
from sparsae.rules.parts.pruning import Pruning
from sparsae.rules.parts.rule import NoState
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import mlp
from tests.support.sections import backward

CONFIG = SparsifierConfig(steps=40, topology=SetConfig(every=5))
PARTS: dict[str, Any] = {
    "when": Periodic(5),
    "fraction": CosineFraction(0.3),
    "drop": SmallestMagnitude(),
    "grow": RandomGrowth(),
}

KINDS = {"when": "Cadence", "fraction": "CosineFraction", "drop": "Drop", "grow": "Grow"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: must be a torch.nn.Module"),
        ({"optimizer": mlp()}, "optimizer: must be one torch optimizer"),
        ({"optimizer": []}, "optimizer: must be one torch optimizer"),
        ({"config": 10}, r"config: must be a SparsifierConfig, .* not 10"),
        ({"config": RiglConfig()}, r"with a rule as its topology.*topology=RiglConfig\("),
        ({"score": 3}, "score: must be a function, not 3"),
        ({"study": "x"}, "study: must be a function, not 'x'"),
    ],
)
def test_arguments_of_a_sparsifier(changes: dict[str, Any], message: str) -> None:
    model = mlp()
    given: dict[str, Any] = {"model": model, "optimizer": AdamW(model.parameters()), "config": CONFIG, **changes}
    with pytest.raises(InputError, match=message):
        Sparsifier(given.pop("model"), given.pop("optimizer"), given.pop("config"), **given)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda model: 0.5, "must return the mean cross entropy as a tensor with one element, not 0.5"),
        (lambda model: torch.ones(3), r"not a tensor of shape \(3,\)"),
        (lambda model: torch.ones(()), "must return a loss that depends on the model"),
    ],
)
def test_what_a_score_returns(score: Callable[[nn.Module], Any], message: str) -> None:
    model = mlp()
    proxy = {"terms": {"activity": {"source": "candidate"}}}
    config = SparsifierConfig(steps=40, topology=EvolutionConfig(every=1, selection="elitist", proxy=proxy))  # type: ignore[arg-type]
    optimizer = AdamW(model.parameters())
    sparsifier = Sparsifier(model, optimizer, config, score=lambda step: score(model))
    backward(model, 0)
    sparsifier.before_step()
    optimizer.step()
    with pytest.raises(InputError, match=message):
        sparsifier.after_step()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: HeadLayout("output", 8), "axis must be 'out' or 'in', not 'output'"),  # type: ignore[arg-type]
        (lambda: HeadLayout("in", 0), "size must be the features of a head, at least 1, not 0"),
        (lambda: CosineFraction(30), "first: must be a share of the whole, from 0 to 1"),
        (lambda: CosineFraction(0.3, stop=75), "stop: must be a share"),
        (lambda: CosineFraction(0.3, stop=0.0), "stop: must be above 0"),
        (lambda: Periodic(5, stop=75), "stop: must be a share"),
        (lambda: Periodic(5, start=-0.1), "start: must be a share"),
        (lambda: Once(True), "at: must be a share of the whole, from 0 to 1 \\(0.75\\), not true"),
        (lambda: Cubic(0.1, 75, 5), "stop: must be a share"),
        (lambda: Parameterization(CONFIG, -1, 2), "width: must be a whole number"),  # type: ignore[arg-type]
        (lambda: parameter_groups(mlp().parameters(), 0.1), "model: must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: initialize(CONFIG, mlp(), seed=0), "model: must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: initialize(mlp(), CONFIG, seed=0), "parameterization: must be a Parameterization"),  # type: ignore[arg-type]
    ],
)
def test_values(made: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "1e-3"}, "lr must be a number of at least 0, not '1e-3'"),
        ({"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
        ({"lr": torch.ones(2)}, r"lr has shape \(2,\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be a number from 0 to below 1, not 1.0"),
        ({"eps": 0.0}, "eps must be a number above 0"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number of at least 0"),
    ],
)
def test_settings_of_an_optimizer(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(mlp().parameters(), **given)
    if "weight_decay" in given:
        with pytest.raises(ValueError, match=message):
            parameter_groups(mlp(), **given)


def test_numbers_of_other_libraries_are_numbers() -> None:
    assert CosineFraction(np.float32(0.25), stop=np.float32(0.5)).at(0.0) == 0.25
    assert Periodic(10, stop=np.float32(0.5)).due(10, Horizon(40))
    (group,) = AdamW(mlp().parameters(), lr=np.array(1e-3), betas=np.array([0.8, 0.9])).param_groups  # type: ignore[arg-type]
    assert float(group["lr"]) == 1e-3


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("other", [0.3, RandomGrowth(), Periodic(5), CosineFraction(0.3)])
def test_parts_of_a_rule_are_of_their_kind(name: str, other: Any) -> None:
    if type(other) is type(PARTS[name]):
        other = SmallestMagnitude()
    for made in (
        lambda parts: Exchange("mine", **parts),
        lambda parts: Pruning("mine", **parts, scope="local"),
    ):
        made(PARTS)
        with pytest.raises(InputError, match=f"^{name}: must be a {KINDS[name]}, not"):
            made(PARTS | {name: other})


def test_a_fraction_of_somebodys_own_is_one() -> None:
    class Half:
        def at(self, progress: float) -> float:
            return 0.5

    assert Exchange("mine", **PARTS | {"fraction": Half()}).telemetry(NoState(), 0.3) == {"drop_fraction": 0.5}


class Scores(Drop):
    """A guest's, which gives what it is told to."""

    def __init__(self, given: Callable[[LayerView], Any]) -> None:
        self._given = given

    def scores(self, view: LayerView, rng: torch.Generator) -> Tensor:
        return self._given(view)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda view: view.magnitude[:10], r"a score for each of the layer's \d+ active units, shape \(\d+,\), not"),
        (lambda view: torch.cat([view.magnitude, view.magnitude]), "a score for each"),
        (lambda view: view.magnitude * torch.nan, "not a number"),
        (lambda view: None, "must return a tensor of .* scores, not NoneType"),
    ],
)
@pytest.mark.parametrize("kind", ["exchange", "model", "pruning"])
def test_scores_of_a_guest(kind: str, given: Callable[[LayerView], Any], message: str) -> None:
    parts = PARTS | {"drop": Scores(given), "when": Periodic(1)}
    model = mlp()
    optimizer = AdamW(model.parameters())
    if kind == "pruning":
        rule: Any = Pruning("mine", when=Cubic(0.0, 0.9, 1), drop=parts["drop"], scope="local")
    else:
        rule = Exchange("mine", **parts)
    config = SparsifierConfig(steps=40, topology=SetConfig(), sparsity=0.95 if kind == "pruning" else None)
    sparsifier = Sparsifier(model, optimizer, config, rule=rule)
    backward(model, 0)
    sparsifier.before_step()
    optimizer.step()
    with pytest.raises(InputError, match=message):
        sparsifier.after_step()


def test_a_need_that_was_not_declared_is_named() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters())
    rule = Exchange("mine", **PARTS | {"drop": Scores(lambda view: view.gradient.abs()), "when": Periodic(1)})  # type: ignore[union-attr]
    sparsifier = Sparsifier(model, optimizer, CONFIG, rule=rule)
    backward(model, 0)
    sparsifier.before_step()
    optimizer.step()
    with pytest.raises(AttributeError) as failed:
        sparsifier.after_step()
    assert any("'mine' declares nothing" in note for note in failed.value.__notes__)


def test_what_a_registered_function_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    known = RULES["set"]
    monkeypatch.setattr(
        type(RULES), "__getitem__", lambda self, name: type(known)(**vars(known) | {"build": lambda c: 3})
    )
    with pytest.raises(InputError, match="rule 'set': its registered function must return a Rule, not 3"):
        build_rule(SetConfig())
