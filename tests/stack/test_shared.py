"""What is computed for all runs at once beside what each computes alone: the head's loss, clipping and steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae.core.randomness import generator
from sparsae.losses import language_model_loss
from sparsae.optim import AdamW
from sparsae.stack.head import cross_entropies
from sparsae.stack.steps import norms_of
from sparsae.train.passes import Step


def made(seed: int, runs: int, tokens: int, width: int, vocabulary: int) -> tuple[Tensor, list[nn.Linear], Tensor]:
    rng = generator(seed, "head")
    hidden = torch.randn(runs, tokens, width, generator=rng, dtype=torch.float64)
    heads = [nn.Linear(width, vocabulary, bias=False, dtype=torch.float64) for _ in range(runs)]
    for head in heads:
        head.weight.data = torch.randn(vocabulary, width, generator=rng, dtype=torch.float64)
    return hidden, heads, torch.randint(vocabulary, (runs, tokens), generator=rng)


@given(
    st.integers(0, 99), st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 12), st.integers(1, 5)
)
def test_losses_of_several_heads_are_those_of_each(
    seed: int, runs: int, tokens: int, width: int, vocabulary: int, chunk: int
) -> None:
    hidden, heads, targets = made(seed, runs, tokens, width, vocabulary)
    scales = torch.linspace(0.5, 2.0, runs, dtype=torch.float64)
    alone = hidden.clone().requires_grad_()
    singles = [
        language_model_loss(h, head, t, chunk=chunk, ignore_index=None).total
        for h, head, t in zip(alone.unbind(), heads, targets, strict=True)
    ]
    (torch.stack(singles) * scales).sum().backward()
    expected = [head.weight.grad for head in heads]
    for head in heads:
        head.weight.grad = None
    stacked = hidden.clone().requires_grad_()
    losses = cross_entropies(stacked, [head.weight for head in heads], targets, chunk, torch.float64)
    (losses * scales).sum().backward()
    torch.testing.assert_close(losses, torch.stack(singles), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stacked.grad, alone.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close([head.weight.grad for head in heads], expected, rtol=1e-11, atol=1e-13)


def test_products_in_bfloat16_stay_near_those_in_double_precision() -> None:
    hidden, heads, targets = made(1, 3, 40, 16, 30)
    weights = [(head.weight / 4).detach().float().requires_grad_() for head in heads]
    at = hidden.float().requires_grad_()
    losses = cross_entropies(at, weights, targets, 16, torch.bfloat16)
    losses.sum().backward()
    exact = hidden.clone().requires_grad_()
    wide = [weight.detach().double().requires_grad_() for weight in weights]
    expected = cross_entropies(exact, wide, targets, 16, torch.float64)
    expected.sum().backward()
    assert losses.dtype == torch.float32
    assert (losses - expected).abs().max() < 0.02 * expected.max()
    for got, want in ((at, exact), *zip(weights, wide, strict=True)):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad - want.grad).abs().max() < 0.03 * want.grad.abs().max()


@pytest.mark.parametrize("clips", [(None, 0.1, 100.0), (1e-3, 1e-3, None), (None, None, None)])
def test_steps_together_are_each_one_alone(clips: tuple[float | None, ...]) -> None:
    """Also where a loss or a gradient is not finite, and where some have no gradient at all."""
    rng = generator(3, "steps")
    alone: list[Step] = []
    for number, clip in enumerate((*clips, 1.0, 1.0, 1.0)):
        parameters = [
            nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((3, 4), (5,), (2,))[: 1 + number % 3]
        ]
        for p in parameters:
            p.grad = None if number == 5 else torch.randn(p.shape, generator=rng)
        if number == 4 and parameters[0].grad is not None:
            parameters[0].grad[0] = math.nan
        alone.append(Step(AdamW(parameters, lr=0.1), parameters, clip, loss_is_finite=number != 3))
    together = [
        Step(made := copy.deepcopy(each.optimizer), made.param_groups[0]["params"], each.clip, each.loss_is_finite)
        for each in alone
    ]
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one.parameters, other.parameters, strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.clone()
    before = [[p.detach().clone() for p in each.parameters] for each in alone]
    expected = [each.answer() for each in alone]
    found = norms_of(together)
    torch.testing.assert_close([found[each] for each in together], expected, rtol=1e-6, atol=0.0, equal_nan=True)
    for one, other, first in zip(alone, together, before, strict=True):
        torch.testing.assert_close(list(other.parameters), list(one.parameters), rtol=1e-6, atol=1e-7)
        moved = any(not torch.equal(a, b) for a, b in zip(first, other.parameters, strict=True))
        assert moved == (one.is_made(found[other]) and any(p.grad is not None for p in one.parameters))


def test_runs_without_any_gradient_have_no_norm() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    step = Step(AdamW(parameters), parameters, 1.0, loss_is_finite=True)
    assert norms_of([step]) == {step: 0.0}
    assert norms_of([]) == {}
