"""Runs that train together are the runs that they are alone: losses, swaps, operations, weights."""

from __future__ import annotations

import pytest
import torch

from sparsae.errors import DivergedError, InputError
from sparsae.stack.drive import together
from sparsae.train.passes import Passes
from sparsae.train.stopping import StopRequest
from tests.support.stacks import cases, compared, run_of


@pytest.mark.slow
def test_every_rule_is_itself_in_a_stack() -> None:
    """To the last digits of float64, in one stack of all shapes that has room for some at a time."""
    runs = compared(cases(steps=7, every=3), most=15, dtype=torch.float64, tolerance=1e-9)
    assert {run.name for run in runs if not run.trainer.account.accepted} == {"static", "dense"}


@pytest.mark.slow
def test_the_first_steps_agree_in_single_precision() -> None:
    specifications = {
        name: (method, *settings[:-1], "training.steps=10")
        for name, (method, *settings) in cases(steps=10, every=4).items()
        if name in ("static", "set", "rigl", "gse", "dense")
    }
    compared(specifications, most=8, dtype=torch.float32, tolerance=2e-4)


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    names = ("static", "wild", "set")
    settings = {"wild": ("static", "training.learning_rate=1e30", "training.clip=null", "training.skip_limit=0")}
    runs = [run_of(name, *settings.get(name, (name,)), "training.steps=6") for name in names]
    alone = run_of("static", "static", "training.steps=6")

    def guarded(number: int) -> Passes[str]:
        try:
            yield from runs[number].trainer.running(StopRequest(), lambda: None)
        except DivergedError as error:
            return error.reason
        return "finished"

    ended = dict(together((guarded(number) for number in range(3)), 3))
    assert (ended[0], ended[2]) == ("finished", "finished")
    assert "loss" in ended[1] or "gradient" in ended[1]
    alone.trainer.run(StopRequest(), lambda: None)
    assert alone.rows[-1]["loss"] == pytest.approx(runs[0].rows[-1]["loss"], abs=1e-9)


def test_runs_that_cannot_be_stacked_are_told_and_the_others_go_on() -> None:
    window = "model.transformers={use_sliding_window: true, sliding_window: 4, max_window_layers: 0}"
    refused = [run_of(str(seed), "static", "model.family=qwen3", window, f"seed={seed}") for seed in range(2)]
    runs = [refused[0], run_of("set", "set", "training.steps=4"), refused[1]]

    def guarded(number: int) -> Passes[str]:
        try:
            yield from runs[number].trainer.running(StopRequest(), lambda: None)
        except InputError as error:
            return str(error)
        return f"{runs[number].trainer.step} steps"

    ended = dict(together((guarded(number) for number in range(3)), 3))
    assert "does not attend to all" in ended[0]
    assert ended == {0: ended[0], 1: "4 steps", 2: ended[0]}


def test_a_request_to_stop_reaches_every_run_at_its_next_step() -> None:
    stop, saved = StopRequest(), []
    runs = [run_of(str(seed), "static", f"seed={seed}", "training.steps=9") for seed in range(3)]

    def save(number: int) -> None:
        saved.append((number, runs[number].trainer.step))

    def watched(number: int) -> Passes[bool]:
        for_run = runs[number].trainer.running(stop, lambda: save(number))
        wanted = next(for_run)
        while True:
            if number == 1 and runs[1].trainer.step == 4:
                stop.ask()
            parts = yield wanted
            try:
                wanted = for_run.send(parts)
            except StopIteration as end:
                return bool(end.value)

    assert dict(together((watched(number) for number in range(3)), 3)) == {0: False, 1: False, 2: False}
    assert sorted(saved) == [(0, 5), (1, 5), (2, 4)]  # the last one was still at the end of its step when it was asked


def test_what_stops_a_stack_ends_its_runs() -> None:
    """So that each leaves its directory as it should be."""
    ended = []

    def run(number: int) -> Passes[bool]:
        try:
            return (yield from run_of("s", "static").trainer.running(StopRequest(), lambda: None))
        finally:
            ended.append(number)

    stacked = together((run(number) for number in range(2)), 2)
    broken = RuntimeError("no more")

    def answer(self: object, wanted: object) -> None:
        raise broken

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sparsae.stack.drive.Stack.answer", answer)
        with pytest.raises(RuntimeError, match="no more"):
            next(stacked)
    assert sorted(ended) == [0, 1]
