"""Several runs at a time: the passes that they want are computed together, everything else is each run's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparsae.core.host import on_device
from sparsae.errors import InputError
from sparsae.losses import LossParts
from sparsae.models import decoder_and_head
from sparsae.stack.head import cross_entropies, is_plain
from sparsae.stack.program import Shape, StackedDecoder, shape_of
from sparsae.stack.steps import norms_of
from sparsae.train.objective import Objective
from sparsae.train.passes import Pass, Passes, Request, Step

T = TypeVar("T")
Answer = LossParts | float | InputError  # the last: why a run cannot be stacked


def together(runs: Iterable[Passes[T]], most: int) -> Iterator[tuple[int, T]]:
    """Bring runs to their ends, at most so many at a time; (number, result) of each as it ends.

    A run begins when it is taken from `runs`, as soon as there is room. Whatever ends this ends the runs in progress.
    """
    coming, stack = enumerate(runs), Stack()
    active: dict[int, tuple[Passes[T], Request]] = {}

    def go_on(number: int, run: Passes[T], answer: Answer | None) -> tuple[T] | None:
        """To the run's next request, or to its end, whose result is in a tuple."""
        try:
            if isinstance(answer, InputError):
                active[number] = run, run.throw(answer)
            else:
                active[number] = run, next(run) if answer is None else run.send(answer)
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
            for number, answer in zip(now, _answered(stack, list(now.values())), strict=True):
                if (ended := go_on(number, now[number][0], answer)) is not None:
                    yield number, ended[0]
    finally:
        for run, _ in active.values():
            run.close()


def _answered(stack: Stack, waiting: list[tuple[Passes[T], Request]]) -> list[Answer]:
    try:
        return stack.answer([wanted for _, wanted in waiting])
    except BaseException as error:
        with suppress(StopIteration):  # of one that has told somebody else
            waiting[0][0].throw(error)  # which says what it was about
        raise


class Stack:
    """Answers requests of runs: passes of equal shapes by one program, steps by one update."""

    def __init__(self) -> None:
        self._programs: dict[Shape, StackedDecoder] = {}
        self._shapes: WeakKeyDictionary[Objective, Shape] = WeakKeyDictionary()

    def answer(self, wanted: list[Request]) -> list[Answer]:
        """What each is answered by, in the same order."""
        passes = [each for each in wanted if isinstance(each, Pass)]
        steps = [each for each in wanted if isinstance(each, Step)]
        losses, norms = self._losses(passes), norms_of(steps)
        return [losses[each] if isinstance(each, Pass) else norms[each] for each in wanted]

    def _losses(self, wanted: Sequence[Pass]) -> dict[Pass, LossParts | InputError]:
        """Once the gradients are there."""
        groups: dict[Shape, list[Pass]] = {}
        for each in wanted:
            if each.objective not in self._shapes:
                self._shapes[each.objective] = shape_of(each.objective, each.batch)
                each.objective.compiles_alone = False
            groups.setdefault(self._shapes[each.objective], []).append(each)
        for shape in self._programs.keys() - set(self._shapes.values()):
            self._programs[shape].release()
        found: dict[Pass, LossParts | InputError] = {}
        for shape, members in groups.items():
            try:
                program = self._program(shape, members[0])
            except InputError as error:
                found |= dict.fromkeys(members, error)
            else:
                found |= dict(zip(members, _computed(program, members), strict=True))
        return found

    def _program(self, shape: Shape, wanted: Pass) -> StackedDecoder:
        """The one of a shape; wanted: a pass of it. Raises InputError as `StackedDecoder` does."""
        if shape not in self._programs:
            objective = wanted.objective
            decoder, inputs = decoder_and_head(objective.model)[0], objective.on_device(wanted.batch[:1, :-1])
            self._programs[shape] = StackedDecoder(decoder, inputs, objective.compile_mode)
        return self._programs[shape]


def _computed(program: StackedDecoder, wanted: Sequence[Pass]) -> list[LossParts]:
    """Of passes of equal shapes; a GPU is waited for once."""
    objective = wanted[0].objective
    narrow = objective.precision == "bfloat16"
    tokens_RBT = objective.on_device(torch.stack([each.batch for each in wanted]))
    with torch.autocast(objective.device.type, torch.bfloat16, enabled=narrow):
        decoders = [decoder_and_head(each.objective.model)[0] for each in wanted]
        hidden_RTD = program.hidden_states(decoders, tokens_RBT[..., :-1])
    heads: list[Any] = [decoder_and_head(each.objective.model)[1] for each in wanted]
    plain = [run for run, each in enumerate(wanted) if is_plain(each, heads[run])]
    singles_TD, found, roots = hidden_RTD.unbind(), dict[int, Tensor](), list[Tensor]()
    if plain:
        is_whole = len(plain) == len(wanted)
        own, targets = (t if is_whole else t[plain] for t in (hidden_RTD, tokens_RBT[..., 1:].flatten(1)))
        dtype = torch.bfloat16 if narrow else own.dtype
        losses = cross_entropies(own, [heads[run].weight for run in plain], targets, objective.loss_chunk, dtype)
        shares = torch.tensor([1.0 / wanted[run].passes for run in plain], dtype=losses.dtype, device="cpu")
        roots.append((losses * on_device(shares, losses.device)).sum())
        for run, loss in zip(plain, losses.detach().unbind(), strict=True):
            found[run] = torch.stack((loss, loss, torch.zeros_like(loss)))
    for run in sorted(set(range(len(wanted))) - set(plain)):
        parts = wanted[run].loss(singles_TD[run])
        roots.append(parts.total / wanted[run].passes)
        found[run] = torch.stack([number.detach() for number in parts])
    torch.autograd.backward(roots)
    numbers = torch.stack([found[run] for run in range(len(wanted))]).cpu()
    return [LossParts(*row.unbind()) for row in numbers]
