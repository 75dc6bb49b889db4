"""Causal attention by the native kernels against whole matrices of probabilities in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsae.core.randomness import generator
from sparsae.kernels.cpu import native
from sparsae.kernels.cpu.attention import causal_attention, causal_attention_reference

pytestmark = pytest.mark.skipif(native.absence() is not None, reason=str(native.absence()))
ISAS = ("avx512", "avx2", "neon", "portable")


def tensors(batch: int, heads: int, groups: int, tokens: int, size: int, *, by_token: bool, seed: int) -> list[Tensor]:
    """q, k, v and dy; by_token: with a token's heads side by side, as views of projections are."""
    rng, made = generator(seed, "attention"), []
    for count in (heads, groups, groups, heads):
        shape = (batch, tokens, count, size) if by_token else (batch, count, tokens, size)
        drawn = torch.randn(shape, generator=rng, dtype=torch.float32)
        made.append(drawn.transpose(1, 2) if by_token else drawn)
    return made


def with_gradients(function: object, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = function(*leaves, scale)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def require_close(found: list[Tensor], exact: list[Tensor]) -> None:
    for name, one, other in zip(("y", "dq", "dk", "dv"), found, exact, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        scale = 1 + (float(other.abs().max()) if other.numel() else 0.0)
        assert torch.allclose(one.double(), other, rtol=0, atol=1e-5 * scale), name


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> object:
    before = native.isa()
    if not native.select_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.select_isa(before)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    tokens=st.integers(1, 330),
    size=st.integers(1, 70),
    scale=st.floats(0.01, 3.0),
    by_token=st.booleans(),
    seed=st.integers(0, 100),
)
def test_outputs_and_gradients_are_those_of_float64(
    batch: int, groups: int, shared: int, tokens: int, size: int, scale: float, by_token: bool, seed: int
) -> None:
    given_ = tensors(batch, groups * shared, groups, tokens, size, by_token=by_token, seed=seed)
    exact = with_gradients(causal_attention_reference, *(t.double() for t in given_), scale / size**0.5)  # type: ignore[misc]
    require_close(with_gradients(causal_attention, *given_, scale / size**0.5), exact)  # type: ignore[misc]


@pytest.mark.parametrize("size", [16, 33, 48, 64, 128])
def test_every_instruction_set(isa: str, size: int) -> None:
    given_ = tensors(1, 4, 2, 271, size, by_token=True, seed=size)
    exact = with_gradients(causal_attention_reference, *(t.double() for t in given_), size**-0.5)  # type: ignore[misc]
    require_close(with_gradients(causal_attention, *given_, size**-0.5), exact)  # type: ignore[misc]


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v, dy = tensors(1, 1, 1, 300, 16, by_token=False, seed=1)
    exact = with_gradients(causal_attention_reference, *(t.double() for t in (100 * q, k, v, dy)), 1.0)
    found = with_gradients(causal_attention, 100 * q, k, v, dy, 1.0)
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one.double(), other, rtol=0, atol=1e-3 * float(other.abs().max()))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given_ = tensors(3, 4, 2, 150, 24, by_token=True, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(causal_attention, *given_, 0.2)  # type: ignore[misc]
        torch.set_num_threads(3)
        three = with_gradients(causal_attention, *given_, 0.2)  # type: ignore[misc]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_later_tokens_are_not_seen() -> None:
    q, k, v, _ = tensors(1, 2, 2, 140, 16, by_token=True, seed=3)
    y = causal_attention(q, k, v, 0.25)
    for t in (k, v):
        t[:, :, 70:] = 1e3
    assert torch.equal(causal_attention(q, k, v, 0.25)[:, :, :70], y[:, :, :70])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = tensors(1, 4, 2, 8, 4, by_token=True, seed=4)
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 7, 4\)"):
        causal_attention(q, k[:, :, :7], v, 0.5)
    with pytest.raises(ValueError, match="float64"):
        causal_attention(q.double(), k, v, 0.5)
    with pytest.raises(ValueError, match="4 heads cannot share 3"):
        causal_attention(q, k[:, [0, 1, 1]], v[:, [0, 1, 1]], 0.5)
