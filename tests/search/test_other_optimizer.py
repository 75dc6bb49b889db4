"""Steps of another optimizer than the Sparsifier's, whose momentum no update moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.optim import AdamW
from sparsae.rules import SetConfig
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import mlp
from tests.support.sections import backward

Make = Callable[[nn.Module], torch.optim.Optimizer]
STEPPED: dict[str, Make] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adam": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}
OWN: dict[str, Make] = STEPPED | {"ours": lambda model: AdamW(model.parameters(), lr=0.01)}


def started(optimizer: Callable[[nn.Module], Any]) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    model = mlp()
    made = optimizer(model)
    return model, made, Sparsifier(model, made, SparsifierConfig(steps=40, topology=SetConfig(every=5)))


def steps(model: nn.Module, sparsifier: Sparsifier, step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        model.zero_grad()
        backward(model, sparsifier.step)
        sparsifier.before_step()
        step()
        sparsifier.after_step()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("sparsae")]


@pytest.mark.parametrize("other", STEPPED)
@pytest.mark.parametrize("own", OWN)
def test_an_optimizer_that_takes_the_place_of_the_sparsifiers_is_told_once(
    own: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer, sparsifier = started(OWN[own])
    steps(model, sparsifier, optimizer.step, 10)
    assert not told(caplog)
    steps(model, sparsifier, STEPPED[other](model).step, 10)
    (line,) = told(caplog)
    assert f"what the Sparsifier's {type(optimizer).__name__} keeps of them did not" in line


@pytest.mark.parametrize("own", ["adam", "ours"])
def test_an_optimizer_that_never_steps_is_told(own: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _, sparsifier = started(OWN[own])
    steps(model, sparsifier, STEPPED["sgd"](model).step, 5)
    (line,) = told(caplog)
    assert "another optimizer seems to have made the step" in line


def test_what_keeps_nothing_cannot_be_told_from_another(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, sparsifier = started(lambda model: torch.optim.SGD(model.parameters(), lr=0.01))
    steps(model, sparsifier, optimizer.step, 10)
    assert not told(caplog)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: the groups and the state of the one inside, and no constructor of torch's."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inside"], name)

    def step(self, closure: Any = None) -> None:
        self.inside.step(closure)


@pytest.mark.parametrize("given", ["inside", "wrapper"])
@pytest.mark.parametrize("own", OWN)
def test_a_wrapper_is_no_other_optimizer(own: str, given: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever of the two the Sparsifier has, and whichever steps."""
    wrapper: Any = None

    def make(model: nn.Module) -> Any:
        nonlocal wrapper
        wrapper = Wrapper(OWN[own](model))
        return wrapper if given == "wrapper" else wrapper.inside

    model, _, sparsifier = started(make)
    steps(model, sparsifier, wrapper.step, 10)
    steps(model, sparsifier, wrapper.inside.step, 10)
    assert not told(caplog)


@pytest.mark.parametrize("own", OWN)
def test_a_state_that_was_loaded_is_no_other_optimizers(own: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, sparsifier = started(OWN[own])
    steps(model, sparsifier, optimizer.step, 7)
    optimizer.load_state_dict(optimizer.state_dict())
    steps(model, sparsifier, optimizer.step, 7)
    assert not told(caplog)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_a_compiled_step_is_no_other_optimizers(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, sparsifier = started(
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
    )
    steps(model, sparsifier, torch.compile(optimizer.step, backend="eager"), 10)
    assert not told(caplog)


@pytest.mark.parametrize("forgotten", [True, False])
@pytest.mark.parametrize("own", OWN)
def test_a_state_that_was_forgotten_is_told(own: str, forgotten: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Of an optimizer that is known to keep one, at the first step after the Sparsifier's was loaded."""
    model, optimizer, sparsifier = started(OWN[own])
    steps(model, sparsifier, optimizer.step, 7)
    again, fresh, resumed = started(OWN[own])
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(sparsifier.state_dict())
    if not forgotten:
        fresh.load_state_dict(optimizer.state_dict())  # late, as Lightning does
    steps(again, resumed, fresh.step, 3)
    lines = told(caplog)
    assert len(lines) == (forgotten and own != "sgd")
    assert all("load the optimizer's state too" in line for line in lines)


def test_a_state_of_no_step_needs_none_of_the_optimizers(caplog: pytest.LogCaptureFixture) -> None:
    model, _, sparsifier = started(OWN["adam"])
    again, fresh, resumed = started(OWN["adam"])
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(sparsifier.state_dict())
    steps(again, resumed, fresh.step, 3)
    assert not told(caplog)
