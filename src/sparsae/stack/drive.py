"""Several runs at a time: the passes that they want are computed together, everything else is each run's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from sparsae.losses import LossParts
from sparsae.models import decoder_and_head
from sparsae.stack.program import Shape, StackedDecoder, shape_of
from sparsae.train.objective import Objective
from sparsae.train.passes import Pass, Passes

T = TypeVar("T")


def together(runs: Iterable[Passes[T]], most: int) -> Iterator[tuple[int, T]]:
    """Bring runs to their ends, at most so many at a time; (number, result) of each as it ends.

    A run begins when it is taken from `runs`, as soon as there is room. Whatever ends this ends the runs in progress.
    """
    coming, stack = enumerate(runs), Stack()
    active: dict[int, tuple[Passes[T], Pass]] = {}

    def go_on(number: int, run: Passes[T], parts: LossParts | None) -> tuple[T] | None:
        """To the run's next pass, or to its end, whose result is in a tuple."""
        try:
            active[number] = run, next(run) if parts is None else run.send(parts)
        except StopIteration as end:
            active.pop(number, None)
            return (end.value,)
        return None

    try:
        while True:
            while len(active) < most and (fresh := next(coming, None)) is not None:
                if (ended := go_on(*fresh, None)) is not None:
                    yield fresh[0], ended[0]
            if not active:
                return
            now = dict(active)
            for number, parts in zip(now, _answered(stack, list(now.values())), strict=True):
                if (ended := go_on(number, now[number][0], parts)) is not None:
                    yield number, ended[0]
    finally:
        for run, _ in active.values():
            run.close()


def _answered(stack: Stack, waiting: list[tuple[Passes[T], Pass]]) -> list[LossParts]:
    try:
        return stack.answer([wanted for _, wanted in waiting])
    except BaseException as error:
        waiting[0][0].throw(error)  # which says what it was about
        raise


class Stack:
    """Answers passes of runs, those of equal shapes by one program."""

    def __init__(self) -> None:
        self._programs: dict[Shape, StackedDecoder] = {}
        self._shapes: WeakKeyDictionary[Objective, Shape] = WeakKeyDictionary()

    def answer(self, wanted: list[Pass]) -> list[LossParts]:
        """The losses, once the gradients are there, in the same order."""
        groups: dict[Shape, list[Pass]] = {}
        for each in wanted:
            if each.objective not in self._shapes:
                self._shapes[each.objective] = shape_of(each.objective, each.batch)
            groups.setdefault(self._shapes[each.objective], []).append(each)
        self._programs = {shape: program for shape, program in self._programs.items() if shape in groups}
        found: dict[Pass, LossParts] = {}
        for shape, members in groups.items():
            if shape not in self._programs:
                self._programs[shape] = StackedDecoder(decoder_and_head(members[0].objective.model)[0])
            found |= dict(zip(members, _computed(self._programs[shape], members), strict=True))
        return [found[each] for each in wanted]


def _computed(program: StackedDecoder, wanted: list[Pass]) -> list[LossParts]:
    objective = wanted[0].objective
    with torch.autocast(objective.device.type, torch.bfloat16, enabled=objective.precision == "bfloat16"):
        hidden_RTD = program.hidden_states(
            [decoder_and_head(each.objective.model)[0] for each in wanted],
            [each.objective.on_device(each.batch)[:, :-1] for each in wanted],
        )
    # The head's loss is each run's own, in chunks: the logits of all runs would be by far the largest tensor.
    parts = [each.loss(hidden_TD) for each, hidden_TD in zip(wanted, hidden_RTD.unbind(), strict=True)]
    torch.autograd.backward([part.total / each.passes for each, part in zip(wanted, parts, strict=True)])
    return parts
