"""The score of a topology: the values of a rule's terms, with the model as it would be."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.core.observation import LayerView
from sparsae.core.shards import whole
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear
from sparsae.rules.parts.rule import Candidate, Decision, Rule
from sparsae.score import Score, Trial
from sparsae.search.parallel import DataParallel
from sparsae.search.rows import CandidateRow
from sparsae.surgery import PreparedSwap

log = logging.getLogger(__name__)

# The mean cross entropy (a scalar with gradient) on the held-out micro-batch of an update; the argument is the step.
ScoreFunction = Callable[[int], Tensor]
# The mean cross entropy of the model as it is on all validation text, to compare scores with.
StudyFunction = Callable[[], float]


class Passes:
    """The forward and the backward pass of one topology on the micro-batch, made when a term first asks for them.

    values: the parameters whose gradients are wanted, by layer; None: there will be no backward pass.
    """

    def __init__(self, loss: Callable[[], Tensor], values: Mapping[str, Tensor] | None, parallel: DataParallel) -> None:
        self._loss, self._names = loss, None if values is None else list(values)
        self._gradients = None if values is None else parallel.gradients_at(list(values.values()))
        self.forwards, self.backwards = 0, 0

    def loss(self) -> float:
        """In nats."""
        return float(self._forward.detach())

    def gradient_norms(self) -> dict[str, float]:
        """By layer; 0 where the loss does not depend on it."""
        assert self._names is not None
        assert self._gradients is not None
        gradients = self._gradients(self._forward)
        self.backwards += 1
        norms = [0.0 if gradient is None else float(whole(gradient).norm()) for gradient in gradients]
        return dict(zip(self._names, norms, strict=True))

    @cached_property
    def _forward(self) -> Tensor:
        self.forwards += 1
        with torch.set_grad_enabled(self._names is not None):
            loss: object = self._loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise InputError(f"score must return the mean cross entropy as a tensor with one element, not {found}")
        if self._names is not None and not loss.requires_grad:
            raise InputError("score must return a loss that depends on the model, and without detaching it")
        return loss


class Scoring:
    """Scores topologies of a model.

    forwards, backwards, studied: passes on the micro-batch, and topologies on all validation text, since `forget`.
    """

    def __init__(
        self, model: nn.Module, score: ScoreFunction | None, study: StudyFunction | None, parallel: DataParallel
    ) -> None:
        self._model, self._score, self._study, self._parallel = model, score, study, parallel
        self.forwards, self.backwards, self.studied = 0, 0, 0
        self._told: set[str] = set()

    def forget(self) -> None:
        """Count from 0."""
        self.forwards, self.backwards, self.studied = 0, 0, 0

    def score(
        self,
        rule: Rule[Any],
        candidate: PreparedSwap | None,
        views: Mapping[str, LayerView],
        layers: Mapping[str, SparseLinear],
        step: int,
    ) -> Score:
        """The rule's terms of a candidate, or of the current topology (None)."""
        passes, with_gradient = None, "candidate_gradient" in rule.needs
        if with_gradient or "loss" in rule.needs:
            assert self._score is not None
            values = {name: layer.values for name, layer in layers.items()} if with_gradient else None
            passes = Passes(partial(self._score, step), values, self._parallel)
        trial = Trial(
            views,
            candidate.changes if candidate else {},
            forward=passes.loss if passes else None,
            backward=passes.gradient_norms if passes and with_gradient else None,
        )
        with self._trying(candidate):
            score = {term.name: float(term.value(trial)) for term in rule.terms}
        for name, value in score.items():
            if not math.isfinite(value) and name not in self._told:
                self._told.add(name)
                log.warning(
                    "step %d: the term '%s' is %s, and no such topology is chosen (said once)", step, name, value
                )
        if passes:
            self.forwards += passes.forwards
            self.backwards += passes.backwards
        return score

    def study(self, prepared: Iterable[tuple[int | None, PreparedSwap | None]]) -> dict[int | None, float]:
        """Losses of topologies on all validation text, by index, where that is asked; None is the current topology."""
        found: dict[int | None, float] = {}
        if self._study is None:
            return found
        for index, candidate in prepared:
            with self._trying(candidate):
                found[index] = self._study()
        self.studied += len(found)
        return found

    @contextmanager
    def _trying(self, candidate: PreparedSwap | None) -> Iterator[None]:
        """With a topology, None being the current one, and without gradients."""
        with candidate.preview() if candidate else nullcontext(), _evaluating(self._model), torch.no_grad():
            try:
                yield
            finally:
                self._parallel.in_parts()


def candidate_rows(
    rule: Rule[Any],
    candidates: Sequence[Candidate],
    scores: Sequence[Score | None],
    decision: Decision,
    study: Mapping[int | None, float],
) -> tuple[CandidateRow, ...]:
    """Each candidate for the metrics; study: losses on all validation text by index."""
    values = decision.scores or (None,) * len(candidates)
    return tuple(
        candidate_row(rule, each.proposer, each.swap.size, score, value, each.rejected, study.get(index))
        for index, (each, score, value) in enumerate(zip(candidates, scores, values, strict=True))
    )


def candidate_row(
    rule: Rule[Any],
    proposer: str,
    swaps: int,
    score: Score | None,
    value: float | None,
    rejected: str | None,
    study: float | None,
) -> CandidateRow:
    """One topology that was or might have been scored, for the metrics."""
    return CandidateRow(
        proposer=proposer,
        swaps=swaps,
        terms=dict.fromkeys((term.name for term in rule.terms), math.nan) if score is None else dict(score),
        score=math.nan if value is None else value,
        rejected=rejected,
        validation_cross_entropy=study,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own mode given back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
