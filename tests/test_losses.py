"""The chunked loss against its whole-logits twin: values, gradients, and how much exists at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.losses import LossParts, distillation_loss, language_model_loss, language_model_loss_reference
from sparsae.nn.linear import SparseLinear

IGNORE = -100


class Problem:
    """Random hidden states, heads and targets in one dtype."""

    def __init__(
        self, tokens: int = 23, width: int = 6, vocab: int = 11, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        rng = generator(seed, "losses")

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

        self.hidden = draw(tokens, width).requires_grad_()
        self.teacher_hidden = draw(tokens, width)
        self.head, self.teacher_head = nn.Linear(width, vocab, dtype=dtype), nn.Linear(width, vocab, dtype=dtype)
        for head in (self.head, self.teacher_head):
            head.weight.data, head.bias.data = draw(vocab, width), draw(vocab)
        self.targets = torch.randint(0, vocab, (tokens,), generator=rng)

    def ignoring(self, share: float) -> Problem:
        ignored = torch.rand(self.targets.shape, generator=generator(1, "ignored")) < share
        ignored[0] = False
        self.targets = self.targets.masked_fill(ignored, IGNORE)
        return self

    def gradients(self, parts: LossParts, scale: float = 1.0) -> list[Tensor]:
        return list(torch.autograd.grad(scale * parts.total, [self.hidden, *self.head.parameters()]))


def chunked(p: Problem, alpha: float, chunk: int) -> LossParts:
    teacher = {"teacher_hidden_TD": p.teacher_hidden, "teacher_head": p.teacher_head}
    return language_model_loss(p.hidden, p.head, p.targets, **teacher, alpha=alpha, chunk=chunk)  # type: ignore[arg-type]


def whole(p: Problem, alpha: float) -> LossParts:
    return language_model_loss_reference(
        p.hidden, p.head, p.targets, teacher_hidden_TD=p.teacher_hidden, teacher_head=p.teacher_head, alpha=alpha
    )


@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([1.0, -2.5]),
    st.integers(0, 2**20),
)
def test_values_and_gradients_equal_those_of_whole_logits(
    tokens: int, chunk: int, alpha: float, ignored: float, scale: float, seed: int
) -> None:
    problem = Problem(tokens, seed=seed).ignoring(ignored)
    got, expected = chunked(problem, alpha, chunk), whole(problem, alpha)
    torch.testing.assert_close(list(got), list(expected), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        problem.gradients(got, scale), problem.gradients(expected, scale), rtol=1e-11, atol=1e-13
    )


def test_the_divergence_is_the_formula_of_the_method() -> None:
    problem = Problem()
    parts = chunked(problem, alpha=0.3, chunk=7)
    with torch.no_grad():
        p_student = problem.head(problem.hidden).softmax(-1)
        p_teacher = problem.teacher_head(problem.teacher_hidden).softmax(-1)
        divergence = (p_teacher * (p_teacher.log() - p_student.log())).sum(-1).mean()
        cross_entropy = -p_student.gather(1, problem.targets[:, None]).log().mean()
    torch.testing.assert_close(parts.distillation, divergence)
    torch.testing.assert_close(parts.cross_entropy, cross_entropy)
    torch.testing.assert_close(parts.total.detach(), cross_entropy + 0.3 * divergence)


def test_only_the_total_carries_gradients_and_the_teacher_gets_none() -> None:
    problem = Problem()
    problem.teacher_hidden.requires_grad_()
    parts = chunked(problem, alpha=0.5, chunk=8)
    assert (parts.total.requires_grad, parts.cross_entropy.requires_grad, parts.distillation.requires_grad) == (
        True, False, False,
    )  # fmt: skip
    parts.total.backward()
    assert problem.teacher_hidden.grad is None
    assert all(parameter.grad is None for parameter in problem.teacher_head.parameters())


def test_a_teacher_equal_to_the_student_has_no_divergence_and_no_pull() -> None:
    problem = Problem()
    parts = language_model_loss(
        problem.hidden, problem.head, problem.targets,
        teacher_hidden_TD=problem.hidden.detach(), teacher_head=problem.head, alpha=1.0, chunk=5,
    )  # fmt: skip
    assert abs(float(parts.distillation)) < 1e-14
    torch.testing.assert_close(problem.gradients(parts), problem.gradients(chunked(problem, 0.0, 5)))


def test_a_tied_head_sums_the_gradients_of_embedding_and_logits() -> None:
    rng = generator(0, "tied")
    tokens = torch.randint(0, 13, (20,), generator=rng)

    def gradient(chunk: int | None) -> Tensor:
        embedding = nn.Embedding(13, 8, dtype=torch.float64)
        embedding.weight.data = torch.randn(13, 8, generator=generator(1, "tied"), dtype=torch.float64)
        head = nn.Linear(8, 13, bias=False)
        head.weight = embedding.weight
        hidden = embedding(tokens).tanh()
        if chunk is None:
            parts = language_model_loss_reference(hidden, head, tokens)
        else:
            parts = language_model_loss(hidden, head, tokens, chunk=chunk)
        parts.total.backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    torch.testing.assert_close(gradient(chunk=6), gradient(None), rtol=1e-12, atol=1e-14)


def test_any_head_will_do_a_sparse_one_too() -> None:
    problem = Problem()
    topology = Topology.random((11, 6), 25, generator(0, "head"))
    values = torch.randn(25, generator=generator(0, "values"), dtype=torch.float64)
    problem.head = SparseLinear(topology, values, torch.zeros(11, dtype=torch.float64))  # type: ignore[assignment]
    got, expected = chunked(problem, 0.2, 4), whole(problem, 0.2)
    torch.testing.assert_close(list(got), list(expected))
    torch.testing.assert_close(problem.gradients(got), problem.gradients(expected))


def test_frozen_parts_get_no_gradient_and_change_no_other() -> None:
    problem = Problem()
    expected = problem.gradients(chunked(problem, 0.0, 5))
    problem.head.requires_grad_(False)
    (alone,) = torch.autograd.grad(chunked(problem, 0.0, 5).total, [problem.hidden])
    torch.testing.assert_close(alone, expected[0])
    problem.head.requires_grad_(True)
    problem.hidden = problem.hidden.detach()
    weights = torch.autograd.grad(chunked(problem, 0.0, 5).total, list(problem.head.parameters()))
    torch.testing.assert_close(list(weights), expected[1:])


def test_the_head_may_go_without_gradients() -> None:
    problem = Problem()
    expected = problem.gradients(chunked(problem, 0.0, 5))[0]
    parts = language_model_loss(problem.hidden, problem.head, problem.targets, chunk=5, head_gradient=False)
    parts.total.backward()
    assert all(parameter.grad is None for parameter in problem.head.parameters())
    torch.testing.assert_close(problem.hidden.grad, expected)


class RecordingHead(nn.Linear):
    """Remembers the most rows it saw, and whether a graph was recorded."""

    most_rows, recorded = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, x.shape[0])
        self.recorded |= torch.is_grad_enabled()
        return super().forward(x)


def test_no_more_than_one_chunk_of_logits_exists() -> None:
    tokens, width, vocab, chunk = 100, 4, 60, 16
    problem = Problem(tokens, width, vocab)
    problem.head = RecordingHead(width, vocab, dtype=torch.float64)
    problem.teacher_head = RecordingHead(width, vocab, dtype=torch.float64)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        parts = chunked(problem, alpha=0.5, chunk=chunk)
    assert (problem.head.most_rows, problem.teacher_head.most_rows) == (chunk, chunk)
    assert not problem.teacher_head.recorded
    assert max(sizes) <= chunk * vocab
    # What outlives the forward pass is what the graph of the total holds: gradients of hidden states and of the head.
    node = parts.total.grad_fn
    assert node is not None
    assert sum(t.numel() for t in node.saved_tensors) == tokens * width + vocab * width + vocab


def test_without_gradients_none_are_computed() -> None:
    problem = Problem()
    head = problem.head = RecordingHead(6, 11, dtype=torch.float64)
    with torch.no_grad():
        parts = chunked(problem, 0.5, 5)
    assert not head.recorded
    assert not parts.total.requires_grad
    torch.testing.assert_close(list(parts), [part.detach() for part in whole(problem, 0.5)])


@pytest.mark.parametrize("validate_first", [False, True])
def test_autocast_is_the_same_inside_as_outside(validate_first: bool) -> None:
    problem = Problem(tokens=64, width=16, vocab=32, dtype=torch.float32)
    seen: list[torch.dtype] = []
    problem.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        if validate_first:  # the cast weight that this leaves in autocast's cache has no graph
            with torch.no_grad():
                chunked(problem, 0.3, 24)
        got, expected = chunked(problem, 0.3, 24), whole(problem, 0.3)
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(list(got), list(expected))
    for one, other in zip(problem.gradients(got), problem.gradients(expected), strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 * float(other.abs().max()))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    problem = Problem(tokens=512, dtype=torch.bfloat16)
    parts = chunked(problem, 0.3, 100)
    assert [part.dtype for part in parts] == [torch.float32] * 3
    exact = chunked(Problem(tokens=512), 0.3, 100)
    assert parts.total.item() == pytest.approx(exact.total.item(), rel=0.01)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    problem = Problem()
    (first,) = torch.autograd.grad(chunked(problem, 0.0, 5).total.square(), [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_distillation_loss_takes_batches_of_sequences() -> None:
    problem = Problem(tokens=24).ignoring(0.3)
    logits, teacher = problem.head(problem.hidden), problem.teacher_head(problem.teacher_hidden)
    parts = distillation_loss(logits.view(4, 6, -1), teacher.view(4, 6, -1), problem.targets.view(4, 6), 0.7)
    torch.testing.assert_close(list(parts), list(chunked(problem, 0.7, 10)))
    alone = distillation_loss(logits, None, problem.targets, 0.7)
    assert float(alone.distillation) == 0.0
    torch.testing.assert_close(alone.total, alone.cross_entropy)


def test_what_cannot_be_is_an_error() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="teacher_hidden_TD and teacher_head"):
        language_model_loss(problem.hidden, problem.head, problem.targets, alpha=0.1)
    with pytest.raises(ValueError, match="no target counts"):
        language_model_loss(problem.hidden, problem.head, torch.full_like(problem.targets, IGNORE))


@pytest.mark.parametrize("taught", [1, 5, 13, 23])
@pytest.mark.parametrize("chunk", [4, 13, 50])
def test_a_teacher_of_the_first_tokens_teaches_these(taught: int, chunk: int) -> None:
    problem = Problem().ignoring(0.3)
    problem.teacher_hidden = problem.teacher_hidden[:taught]
    mine, other = chunked(problem, 0.6, chunk), whole(problem, 0.6)
    for part, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(part, expected)
    for gradient, expected in zip(problem.gradients(mine, 3.0), problem.gradients(other, 3.0), strict=True):
        torch.testing.assert_close(gradient, expected)
    first = Problem().ignoring(0.3)
    first.hidden, first.targets = first.hidden[:taught], first.targets[:taught]
    first.teacher_hidden = problem.teacher_hidden
    torch.testing.assert_close(mine.distillation, whole(first, 0.6).distillation)


def test_a_teacher_teaches_no_more_tokens_than_there_are() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="a teacher of 23 tokens for 20"):
        language_model_loss(
            problem.hidden[:20], problem.head, problem.targets[:20], teacher_hidden_TD=problem.teacher_hidden,
            teacher_head=problem.teacher_head, alpha=0.5,
        )  # fmt: skip
    # Where none of what is taught counts, nothing is learned from it.
    problem = Problem()
    problem.targets[:5] = IGNORE
    problem.teacher_hidden = problem.teacher_hidden[:5]
    for parts in (chunked(problem, 0.5, 3), whole(problem, 0.5)):
        assert float(parts.distillation) == 0.0
        assert float(parts.total.detach()) == float(parts.cross_entropy)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradients_in_float16_survive_the_number_of_tokens(alpha: float) -> None:
    """A GradScaler multiplies what backward gives: what a forward pass had rounded to 0 stays 0."""
    p = Problem(tokens=1024, width=16, vocab=2048, dtype=torch.float32)
    for head in (p.head, p.teacher_head):
        head.weight.data.mul_(0.1)
    exact = p.gradients(whole(p, alpha))
    with torch.autocast("cpu", torch.float16):
        found = chunked(p, alpha, chunk=256)
    for got, right in zip(p.gradients(found, scale=2.0**16), exact, strict=True):
        assert float((got / 2.0**16 - right).norm() / right.norm()) < 2e-3
    half = Problem(tokens=64, dtype=torch.float16)
    wide = Problem(tokens=64, dtype=torch.float32)
    pairs = zip(half.gradients(chunked(half, alpha, 7)), wide.gradients(chunked(wide, alpha, 7)), strict=True)
    assert all(float((a.float() - b).norm() / b.norm()) < 5e-3 for a, b in pairs)


def test_targets_are_as_many_as_tokens() -> None:
    p = Problem(tokens=8)
    for targets in (torch.zeros(12, dtype=torch.int64), p.targets[:4], p.targets[None]):
        with pytest.raises(ValueError, match=r"targets \(.*\) for hidden states \(8, 6\)"):
            language_model_loss(p.hidden, p.head, targets, chunk=4)
    with pytest.raises(ValueError, match=r"targets \(8,\) for hidden states \(1, 8, 6\)"):
        language_model_loss(p.hidden[None], p.head, p.targets)
    with pytest.raises(ValueError, match="chunk must be at least 1 token, not 0"):
        language_model_loss(p.hidden, p.head, p.targets, chunk=0)


def test_a_class_that_neither_model_has_costs_nothing() -> None:
    p = Problem(dtype=torch.float32)
    p.targets.clamp_(max=9)
    without = Problem(vocab=10, dtype=torch.float32)
    for head, smaller in ((p.head, without.head), (p.teacher_head, without.teacher_head)):
        head.bias.data[10] = -torch.inf
        smaller.weight.data, smaller.bias.data = head.weight.data[:10].clone(), head.bias.data[:10].clone()
    without.targets, without.hidden, without.teacher_hidden = p.targets, p.hidden, p.teacher_hidden
    right = whole(without, 0.5)
    expected = torch.autograd.grad(right.total, p.hidden)[0]
    for parts in (chunked(p, 0.5, 7), whole(p, 0.5)):
        torch.testing.assert_close(parts.distillation, right.distillation)
        torch.testing.assert_close(torch.autograd.grad(parts.total, p.hidden)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = chunked(p, 0.5, 7)
    torch.testing.assert_close(rounded.distillation, right.distillation, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("chunk", [1024, 65536])
def test_the_heads_gradient_in_float16_overflows_no_sooner_for_many_tokens(chunk: int) -> None:
    """One feature of 60 at each of 16,384 tokens, all of one class."""
    p = Problem(tokens=16384, width=4, vocab=8, dtype=torch.float32)
    p.hidden.data[:, 0] = 60.0
    p.head.weight.data[:, 0] = 0.0
    p.targets.fill_(1)
    exact = p.gradients(language_model_loss(p.hidden, p.head, p.targets))
    half = Problem(tokens=16384, width=4, vocab=8, dtype=torch.float16)
    half.hidden.data, half.targets = p.hidden.data.half(), p.targets
    half.head.weight.data, half.head.bias.data = p.head.weight.data.half(), p.head.bias.data.half()
    found = half.gradients(language_model_loss(half.hidden, half.head, half.targets, chunk=chunk))
    assert all(grad.dtype == torch.float16 for grad in found)
    assert float((found[1].float() - exact[1]).norm() / exact[1].norm()) < 5e-3


def test_hidden_states_of_float16_keep_their_gradients_in_another_autocast() -> None:
    p = Problem(tokens=4096, width=8, vocab=64, dtype=torch.float32)
    exact = p.gradients(language_model_loss(p.hidden, p.head, p.targets))[0]
    p.hidden = p.hidden.detach().half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = p.gradients(language_model_loss(p.hidden, p.head, p.targets), scale=2.0**16)[0]
    assert float((found.float() / 2.0**16 - exact).norm() / exact.norm()) < 0.02
