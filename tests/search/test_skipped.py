"""A step that was skipped has its place in the schedules, and is no step of whatever counts steps that were made."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import pytest
import torch

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import OPTIMIZERS, mlp
from tests.support.sections import backward


class Skipping:
    """A loop that skips steps, whose gradients may be finite all the same: it says so, or as a gradient scaler not."""

    def __init__(self, optimizer: str, topology: dict[str, Any], is_told: bool = True, **teacher: Any) -> None:
        self.model, self.is_told = mlp(), is_told
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[optimizer](self.model)
        settings = {"steps": 20, "topology": topology, "teacher": {"enabled": bool(teacher), **teacher}}
        self.sparsifier = Sparsifier(self.model, self.optimizer, SparsifierConfig.model_validate(settings))

    def run(self, steps: int, skipped: Collection[int] = ()) -> dict[int, Any]:
        """By step, counted from 1: the update that followed."""
        updates = {}
        for _ in range(steps):
            step = self.sparsifier.step + 1
            self.optimizer.zero_grad()
            backward(self.model, step)
            self.sparsifier.before_step()
            if step not in skipped:
                self.optimizer.step()
            update = self.sparsifier.after_step(step not in skipped) if self.is_told else self.sparsifier.after_step()
            updates |= {step: update} if update else {}
        return updates


@pytest.mark.parametrize("scope", ["new", "all"])
@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_burn_in_lasts_for_steps_that_were_made(optimizer: str, is_told: bool, scope: str) -> None:
    topology = {"rule": "evolution", "every": 8, "candidates": 1, "burn_in": {"steps": 3, "scope": scope}}
    loop, left = Skipping(optimizer, topology, is_told), []
    loop.run(8)
    for _ in range(5):
        loop.run(1, skipped={10, 11})
        left.append(loop.sparsifier._burn_in.steps_left)
    assert left == [2, 2, 2, 1, 0]


@pytest.mark.parametrize("grown", ["zero", "student"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_but_the_schedule_moves_in_a_step_that_was_skipped(optimizer: str, grown: str) -> None:
    """Gradients are finite, so that the update that is due would be made by them."""
    loop = Skipping(optimizer, {"rule": "set", "every": 4, "ramp": 9}, beta=0.9, grown=grown)

    def seen() -> Any:
        state = loop.sparsifier.state_dict()
        kept = {name: state[name] for name in ("burn_in", "ramp", "teacher")}
        return copy.deepcopy((kept, loop.model.state_dict(), loop.optimizer.state_dict()["state"]))

    loop.run(5)
    before = seen()
    waiting = loop.run(3, skipped={6, 7, 8})
    assert {step: update.row["skipped"] for step, update in waiting.items()} == {8: "step"}
    assert loop.sparsifier.step == 8
    torch.testing.assert_close(seen(), before, rtol=0, atol=0)
    update = loop.run(1)[9]
    assert (update.accepted, update.row["skipped"], loop.sparsifier.update_due) == (True, None, False)


def test_a_teacher_begins_on_time_where_the_step_before_was_skipped() -> None:
    loop = Skipping("ours", {"rule": "static"}, start=0.2)
    loop.run(4, skipped={4})
    assert loop.sparsifier.teacher is not None
    assert loop.sparsifier.teacher.begun
