"""Losses of logits and their gradient by the native kernels, against torch's operators in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsae.core.randomness import generator
from sparsae.kernels.backend import LossInputs, LossSums, LossWeights
from sparsae.kernels.cpu import native
from sparsae.kernels.cpu.losses import losses
from sparsae.kernels.registry import BACKENDS, losses_backend
from sparsae.losses import _backend, _sums, language_model_loss

pytestmark = pytest.mark.skipif(native.absence() is not None, reason=str(native.absence()))
WEIGHTS = LossWeights(0.3, 0.7)


def found_of(*given: Any) -> LossSums:
    return losses(LossInputs(*given))


def check(logits: Tensor, targets: Tensor, teacher: Tensor | None, ignore_index: int | None) -> None:
    exact = logits.double().requires_grad_()
    want = _sums(exact, None if teacher is None else teacher.double(), targets, ignore_index)
    (slope,) = torch.autograd.grad(0.3 * want[0] + 0.7 * want[1], exact)
    found = found_of(logits, targets, teacher, ignore_index, WEIGHTS, True)
    alone = found_of(logits, targets, teacher, ignore_index, WEIGHTS, False)
    torch.testing.assert_close(torch.stack(found[:2]).double(), torch.stack(want).detach(), rtol=2e-6, atol=1e-5)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient.double(), slope, rtol=1e-5, atol=1e-7)
    assert alone.gradient is None
    assert torch.equal(torch.stack(alone[:2]), torch.stack(found[:2]))


def drawn(tokens: int, vocabulary: int, taught: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    rng = generator(seed, "losses")
    logits = 4 * torch.randn(tokens, vocabulary, generator=rng)
    teacher = None if taught is None else 4 * torch.randn(min(taught, tokens), vocabulary, generator=rng)
    return logits, torch.randint(vocabulary, (tokens,), generator=rng), teacher


@given(
    tokens=st.integers(1, 9),
    vocabulary=st.sampled_from([1, 2, 15, 16, 40, 2048, 2500, 5000]),
    taught=st.none() | st.integers(1, 9),
    ignore_index=st.sampled_from([None, -100, -1, 0]),
    seed=st.integers(0, 2**32),
)
def test_sums_and_gradient_are_those_of_float64(
    tokens: int, vocabulary: int, taught: int | None, ignore_index: int | None, seed: int
) -> None:
    logits, targets, teacher = drawn(tokens, vocabulary, taught, seed)
    if ignore_index is not None:
        targets[torch.rand(tokens, generator=generator(seed, "ignored")) < 0.3] = ignore_index
    check(logits, targets, teacher, ignore_index)


@pytest.mark.parametrize("taught", [None, 3])
def test_every_instruction_set(isa: str, taught: int | None) -> None:
    for vocabulary in (3, 70, 4100):
        check(*drawn(5, vocabulary, taught, vocabulary), -100)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    logits, targets, teacher = drawn(6, 50, 6, 1)
    assert teacher is not None
    check(300 * logits, targets, teacher, None)
    check(logits + 1e4, targets, teacher - 1e4, None)


def test_what_a_head_rules_out_has_neither_loss_nor_gradient() -> None:
    logits, targets, teacher = drawn(4, 20, 4, 2)
    assert teacher is not None
    targets.fill_(3)
    for row in (logits, teacher):
        row[:, 10:] = -torch.inf
    found, kept = (
        found_of(a, targets, b, None, WEIGHTS, True) for a, b in ((logits, teacher), _firsts(logits, teacher))
    )
    assert found.gradient is not None
    assert kept.gradient is not None
    torch.testing.assert_close(found[:2], kept[:2])
    torch.testing.assert_close(found.gradient[:, :10], kept.gradient)
    assert float(found.gradient[:, 10:].abs().max()) == 0
    targets.fill_(12)
    assert float(found_of(logits, targets, None, None, WEIGHTS, True).cross_entropy) == torch.inf


def _firsts(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(row[:, :10].contiguous() for row in rows)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 7, 37])
def test_what_is_no_number_stays_none(number: float, place: int) -> None:
    logits, targets, teacher = drawn(3, 40, 3, 3)
    assert teacher is not None
    logits[1, place] = number
    found = found_of(logits, targets, teacher, None, WEIGHTS, True)
    assert found.gradient is not None
    assert bool(found.cross_entropy.isnan())
    assert found.gradient.isnan().any(1).tolist() == [False, True, False]
    logits, _, teacher = drawn(3, 40, 3, 3)
    assert teacher is not None
    teacher[1, place] = number
    found = found_of(logits, targets, teacher, None, WEIGHTS, True)
    assert [bool(one.isnan()) for one in found[:2]] == [False, True]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given_, before = drawn(70, 300, 40, 4), torch.get_num_threads()
    found: list[LossSums] = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(found_of(*given_, None, WEIGHTS, True))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize(("target", "ignore_index"), [(20, None), (-1, None), (-1, -100), (-100, None)])
def test_a_target_that_is_no_class_is_told(target: int, ignore_index: int | None) -> None:
    logits, targets, _ = drawn(4, 20, None, 5)
    targets[2] = target
    with pytest.raises(IndexError, match=rf"^target {target} is out of bounds: there are 20 classes$"):
        found_of(logits, targets, None, ignore_index, WEIGHTS, True)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        head = nn.Linear(6, 20, dtype=dtype)
        with pytest.raises(IndexError, match=rf"(?i)target {target} is out of bounds"):
            language_model_loss(torch.zeros(4, 6, dtype=dtype), head, targets, ignore_index=ignore_index)


def test_which_logits_they_are_asked_for() -> None:
    logits = torch.zeros(4, 6)
    cpu = BACKENDS["cpu"]
    assert losses_backend(logits, None) is losses_backend(logits, logits[:2]) is cpu
    for other in (logits.double(), logits.bfloat16(), logits.t(), logits[:, :3], logits.to("meta")):
        assert losses_backend(other, None) is None
        assert losses_backend(logits, other) is None


def test_a_head_may_keep_its_logits_for_its_own_backward_pass() -> None:
    class Capped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * torch.tanh(super().forward(x) / 5)  # whose gradient is of its output

    head = Capped(6, 30)
    rng = generator(6, "losses")
    hidden, targets = torch.randn(23, 6, generator=rng).requires_grad_(), torch.randint(30, (23,), generator=rng)
    found = language_model_loss(hidden, head, targets, chunk=5).total
    want = nn.functional.cross_entropy(head(hidden), targets)
    leaves = [hidden, *head.parameters()]
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves))


def test_whatever_does_not_fit_goes_to_operators_that_tell() -> None:
    logits, targets, teacher = drawn(6, 20, 4, 7)
    assert teacher is not None
    assert _backend(logits, targets, teacher) is BACKENDS["cpu"]
    wrong_targets = [targets.to(dtype) for dtype in (torch.int32, torch.uint8, torch.float32, torch.bool)]
    wrong_targets += [targets[:5], torch.cat([targets, targets]), targets[:, None], targets.to("meta")]
    for wrong in wrong_targets:
        assert _backend(logits, wrong, teacher) is None
    for other in (logits[:5], torch.cat([logits, logits]), logits[None], logits[:, None], logits[:, :0]):
        assert _backend(other, targets, None) is None
    more = torch.cat([logits, logits])
    for other in (teacher[:, :19].contiguous(), torch.cat([teacher, teacher], 1), teacher[None], teacher[0], more):
        assert _backend(logits, targets, other) is None
    for lazy in (torch._neg_view(logits), nn.Parameter(logits)):
        assert _backend(lazy, targets, teacher) is None
        assert _backend(logits, targets, lazy) is None
    with FakeTensorMode():
        assert _backend(logits, targets, teacher) is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32])
def test_targets_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    head = nn.Linear(6, 30)
    with pytest.raises(RuntimeError, match=r"target|expected scalar type Long"):
        language_model_loss(torch.zeros(5, 6), head, torch.ones(5, dtype=dtype))


def test_teachers_of_another_vocabulary_are_refused() -> None:
    hidden, targets = torch.ones(5, 6), torch.ones(5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="size"):
        language_model_loss(
            hidden, nn.Linear(6, 30), targets, teacher_hidden_TD=hidden, teacher_head=nn.Linear(6, 29), alpha=0.5
        )
