"""A Sparsifier that hangs on the optimizer's step hooks: one line instead of three, whatever is around the step."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsae.config.rules import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.rules import EvolutionConfig, GseConfig, RiglConfig, SetConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.updates import Update
from tests.support.loops import OPTIMIZERS, mlp, score_of

RULES: dict[str, RuleConfig] = {
    "set": SetConfig(every=3),
    "rigl": RiglConfig(every=3),
    "gse": GseConfig(every=3),
    "evolution": EvolutionConfig.model_validate({"every": 3, "burn_in": {"steps": 2, "scope": "new"}}),
}
STEPS = 24


class Twice(torch.optim.AdamW):
    """torch runs the hooks at both classes' step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Accelerated(Optimizer):
    """As accelerate's wrapper: made without torch's constructor; steps where gradients were accumulated."""

    def __init__(self, optimizer: Optimizer, every: int = 1) -> None:
        self.optimizer, self.every, self.calls = optimizer, every, 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % self.every == 0:
            self.optimizer.zero_grad(set_to_none)


def lookahead(model: nn.Module) -> Optimizer:
    from pytorch_optimizer import Lookahead

    return Lookahead(torch.optim.AdamW(model.parameters(), lr=3e-3))


MADE: dict[str, Callable[[nn.Module], Optimizer]] = {
    **OPTIMIZERS,
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True),
    "lookahead": lookahead,
    "twice": lambda model: Twice(model.parameters(), lr=3e-3),
    "accelerated": lambda model: Accelerated(torch.optim.AdamW(model.parameters(), lr=3e-3)),
}


class Loop:
    """A model in training; `one` is a step as somebody writes it, with the three lines or without."""

    def __init__(self, rule: str = "rigl", made: str = "adamw", attached: bool = True, **settings: Any) -> None:
        self.model, self.updates, self.attached = mlp(), list[Update](), attached
        self.optimizer = MADE[made](self.model)
        config = SparsifierConfig(steps=STEPS, topology=RULES[rule], **settings)
        self.sparsifier = Sparsifier(self.model, self.optimizer, config, score=score_of(self.model))  # type: ignore[arg-type]
        if attached:
            assert self.sparsifier.attach(self.updates.append) is self.sparsifier

    def loss(self, step: int) -> Tensor:
        x = torch.randn(8, 24, generator=generator(5, "x", step))
        return (self.model(x) - x.roll(1, 1)).square().mean()

    def one(self, step: int, clip: float | None = None, call: Callable[[], object] | None = None) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if not self.attached:
            self.sparsifier.before_step()
        (call or self.optimizer.step)()
        if not self.attached and (update := self.sparsifier.after_step()):
            self.updates.append(update)


def assert_same(one: Loop, two: Loop) -> None:
    assert one.sparsifier.step == two.sparsifier.step
    assert [(u.row["step"], u.accepted) for u in one.updates] == [(u.row["step"], u.accepted) for u in two.updates]
    assert one.updates
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("rule", RULES)
def test_the_one_line_does_what_the_three_do(rule: str, made: str) -> None:
    one, three = Loop(rule, made), Loop(rule, made, attached=False)
    for step in range(STEPS - 1):
        one.one(step)
        three.one(step)
    assert_same(one, three)


@pytest.mark.parametrize("made", ["adamw", "ours", "fused"])
def test_learning_rate_schedulers_teachers_and_clipping_go_with_it(made: str) -> None:
    loops = [Loop(made=made, attached=attached, teacher=TeacherConfig()) for attached in (True, False)]
    for loop in loops:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, STEPS)
        for step in range(STEPS - 1):
            loop.one(step, clip=0.05)
            schedule.step()
    assert_same(*loops)
    assert str(loops[0].sparsifier.state_dict()) == str(loops[1].sparsifier.state_dict())


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("made", ["adamw", "ours", "twice", "lookahead"])
def test_a_closure_that_runs_the_backward_pass(made: str, keyword: bool) -> None:
    """As Lightning steps: gradients appear after the hook was called."""
    one, three = Loop(made=made), Loop(made=made, attached=False)
    for step in range(STEPS - 1):

        def closure(step: int = step) -> Tensor:
            one.optimizer.zero_grad()
            loss = one.loss(step)
            loss.backward()
            return loss

        assert one.optimizer.step(closure=closure) if keyword else one.optimizer.step(closure)  # type: ignore[arg-type]
        three.one(step)
    assert_same(one, three)


def test_the_gradients_that_are_seen_are_clipped_and_those_at_inactive_connections_are_not() -> None:
    """Clipping by norm changes no ranking, so the same connections move; the norms that are told are the clipped."""
    after, before = Loop(), Loop(attached=False)
    for step in range(STEPS - 1):
        after.one(step, clip=1e-3)
        before.optimizer.zero_grad()
        before.loss(step).backward()
        before.sparsifier.before_step()
        nn.utils.clip_grad_norm_(before.model.parameters(), 1e-3)
        before.optimizer.step()
        if update := before.sparsifier.after_step():
            before.updates.append(update)
    assert_same(after, before)
    for clipped, whole in zip(after.updates, before.updates, strict=True):
        norms = [[row["gradient_activity"] for row in u.row["layers"].values()] for u in (clipped, whole)]
        assert math.hypot(*norms[0]) < 1e-3 < 1e-2 < math.hypot(*norms[1])


@pytest.mark.parametrize(("made", "passes"), [("adamw", 2), ("sgd", 1), ("ours", 1), ("fused", 2)])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_a_scaler_skips_never_was(rule: str, made: str, passes: int) -> None:
    """Steps are those that were made: an update that was due in a skipped one is made in the next, of its gradients."""
    one, without = (Loop(rule, made, accumulation=passes) for _ in range(2))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000) for _ in range(2)]

    def scaled(loop: Loop, scaler: torch.amp.GradScaler, step: int, is_bad: bool) -> None:
        loop.optimizer.zero_grad()
        for i in range(passes):
            scaler.scale(loop.loss(10 * step + i) * (math.inf if is_bad else 1.0)).backward()
        scaler.unscale_(loop.optimizer)
        nn.utils.clip_grad_norm_(loop.model.parameters(), 10.0)
        scaler.step(loop.optimizer)
        scaler.update()

    skipped_when_due = 0
    for step in range(STEPS):
        is_bad = step in (0, 3, 4, 10, 11)
        before, due = copy.deepcopy(one.model.state_dict()), one.sparsifier.update_due
        was = one.sparsifier.step
        scaled(one, scalers[0], step, is_bad)
        assert one.sparsifier.step == was + (not is_bad)
        if is_bad:
            skipped_when_due += due
            assert one.sparsifier.update_due == due
            assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())
        else:
            scaled(without, scalers[1], step, False)
    assert skipped_when_due == 2
    assert_same(one, without)
    assert [u.cost for u in one.updates] == [u.cost for u in without.updates]
    assert not any(update.row["skipped"] for update in one.updates)


@pytest.mark.parametrize("made", ["fused", "adamw"])
def test_gradients_that_only_the_kernel_unscales_are_seen_as_they_are(made: str) -> None:
    """A fused optimizer gets them scaled, with the factor: nothing that is looked at may have it."""
    scaled, plain = Loop("evolution", made), Loop("evolution", made)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS - 1):
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss(step)).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        plain.one(step)
    for one, two in zip(scaled.updates, plain.updates, strict=True):
        for name, row in one.row["layers"].items():
            assert row["gradient_activity"] == pytest.approx(two.row["layers"][name]["gradient_activity"], rel=1e-4)


def test_accumulated_steps_count_once() -> None:
    loop = Loop(made="accelerated", accumulation=2)
    loop.optimizer.every = 2  # type: ignore[attr-defined]
    for step in range(12):
        loop.one(step)
    assert loop.sparsifier.step == 6
    assert [update.row["step"] for update in loop.updates] == [3, 6]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, while its compiler is loaded
def test_a_compiled_step() -> None:
    torch._dynamo.reset()
    one, three = Loop(made="sgd"), Loop(made="sgd", attached=False)
    compiled = [torch.compile(loop.optimizer.step, backend="eager") for loop in (one, three)]
    for step in range(7):
        one.one(step, call=compiled[0])
        three.one(step, call=compiled[1])  # which torch 2.11 rounds otherwise than a step that is not compiled
    assert_same(one, three)


def test_a_step_that_raised_is_followed_by_the_next() -> None:
    loop, other = Loop(), Loop()
    for step in range(STEPS - 1):
        if step in (1, 2, 5):
            with pytest.raises(RuntimeError, match="out of memory"):
                loop.one(step, call=lambda: loop.optimizer.step(closure=_exhausted))
        loop.one(step)
        other.one(step)
    assert_same(loop, other)


def _exhausted() -> Tensor:
    raise RuntimeError("out of memory")


def test_a_state_goes_back_into_an_attached_one() -> None:
    loop = Loop(teacher=TeacherConfig())
    parts = (loop.model, loop.optimizer, loop.sparsifier)
    for step in range(7):
        loop.one(step)
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    ends = []
    for _ in range(2):
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        for step in range(7, STEPS - 1):
            loop.one(step)
        ends.append(copy.deepcopy(loop.model.state_dict()))
        with pytest.raises(RuntimeError, match="out of memory"):
            loop.one(0, call=lambda: loop.optimizer.step(closure=_exhausted))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name])


def test_what_cannot_be_is_refused() -> None:
    loop = Loop()
    for call in (loop.sparsifier.before_step, loop.sparsifier.after_step):
        with pytest.raises(InputError, match=f"{call.__name__}.*attached: optimizer.step.* makes its calls"):
            call()
    with pytest.raises(InputError, match="attached already"):
        loop.sparsifier.attach()
    again = Sparsifier(loop.model, loop.optimizer, loop.sparsifier.config)
    with pytest.raises(InputError, match="another Sparsifier is attached to this optimizer, over the same layers"):
        again.attach()
    loop.sparsifier.detach()
    loop.sparsifier.detach()
    again.attach()
    again.detach()
    loop.attached = False
    loop.one(0)
    assert loop.sparsifier.step == 1

    class Foreign(Accelerated):
        optimizer: Any = None

        def __init__(self, optimizer: Optimizer) -> None:
            vars(self).update(hidden=[lambda: optimizer])

        @property
        def param_groups(self) -> Any:
            return loop.optimizer.param_groups

        state = {}  # noqa: RUF012

    foreign = Foreign(loop.optimizer)
    with pytest.raises(InputError, match="Foreign does not run the step hooks of torch"):
        Sparsifier(loop.model, foreign, loop.sparsifier.config).attach()


def test_an_optimizer_that_is_not_used_any_more_is_in_nobodys_way() -> None:
    loop = Loop()
    again = Sparsifier(loop.model, torch.optim.SGD(loop.model.parameters(), lr=0.1), loop.sparsifier.config)
    again.attach()


@pytest.mark.parametrize("end", ["detach", "close"])
def test_the_search_can_end_in_the_middle_of_a_step(end: str) -> None:
    """torch calls its hooks then."""
    loop = Loop(rule="set")
    loop.sparsifier.detach()
    others: list[int] = []
    loop.sparsifier.attach(lambda update: getattr(loop.sparsifier, end)())
    loop.optimizer.register_step_post_hook(lambda *_: others.append(1))
    for step in range(6):
        loop.one(step)
    assert loop.sparsifier.step == 3
    assert len(others) == 6
    if end == "detach":
        loop.sparsifier.attach()
        loop.one(6)
        assert loop.sparsifier.step == 4


def test_the_rule_can_change_with_an_update() -> None:
    loop = Loop(rule="set")
    loop.sparsifier.detach()
    steps = []

    def changed(update: Update) -> None:
        steps.append((update.row["step"], loop.sparsifier.search.rule.name))
        loop.sparsifier.set_rule(RiglConfig(every=4))

    loop.sparsifier.attach(changed)
    for step in range(9):
        loop.one(step)
    assert steps == [(3, "set"), (4, "rigl"), (8, "rigl")]


def test_a_detached_sparsifier_is_forgotten() -> None:
    loop = Loop()
    optimizer = loop.optimizer
    loop.sparsifier.detach()
    known = weakref.ref(loop.sparsifier)
    del loop
    gc.collect()
    assert known() is None
    optimizer.step()
