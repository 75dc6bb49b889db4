"""The training loop. It knows batches, an objective, an optimizer and a Sparsifier, and no method by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sparsae.config.training import TrainingConfig
from sparsae.core.ranks import ranks
from sparsae.errors import DivergedError
from sparsae.observers import Observer, Standing
from sparsae.optim import AdamW
from sparsae.runs.checkpoint import CheckpointTimes
from sparsae.runs.rows import DivergedRow, ExtendedRow, Row, SkippedRow
from sparsae.search.sparsifier import Sparsifier
from sparsae.train.account import Account
from sparsae.train.averages import Averages
from sparsae.train.data import TrainData
from sparsae.train.divergence import diverged
from sparsae.train.learning_rate import LearningRate
from sparsae.train.objective import Objective
from sparsae.train.passes import Pass, Passes, Step, alone
from sparsae.train.stopping import StopRequest
from sparsae.train.validation import Validation


class Trainer:
    """One run from its present step to its last; `state_dict` and `load_state_dict` carry it over a stop."""

    def __init__(
        self,
        settings: TrainingConfig,
        objective: Objective,
        optimizer: AdamW,
        data: TrainData,
        *,
        sparsifier: Sparsifier | None,
        rate: LearningRate,
        account: Account,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.settings, self.objective, self.optimizer, self.data = settings, objective, optimizer, data
        self.sparsifier, self.rate, self.account, self.observers = sparsifier, rate, account, observers
        self.model, self.teacher = objective.model, objective.teacher
        self._parameters = list(self.model.parameters())
        self.validation = Validation(objective, data.validation, data.test, settings)
        self.step = 0
        self._averages = Averages()

    def run(self, stop: StopRequest, save: Callable[[], None]) -> bool:
        """Train until the last step (True) or until a stop is requested (False); `save()` writes a checkpoint.

        Raises DivergedError where a held-out loss or what is to be saved is not finite, and where more steps in a row
        would have to be skipped than may be.
        """
        return alone(self.running(stop, save))

    def running(self, stop: StopRequest, save: Callable[[], None]) -> Passes[bool]:
        """As `run`, by whoever answers its passes."""
        try:
            self._begin()
            times = CheckpointTimes(self.settings.checkpoint_every, self.settings.checkpoint_minutes, self.step)
            while not self.done and not ranks().any(stop.asked):
                with self.account.watch.of("train"):
                    yield from self.stepping()
                if self.validation.due(self.step):
                    self.validate()
                if self._is_best or ranks().any(times.due(self.step)):
                    save()
                    times.saved(self.step)
            if self.step != times.last:
                save()
            if self.done and (loss := self.validation.measure_test(self.account)) is not None:
                self._require_finite("the test loss", loss)
        except DivergedError as error:
            self._tell(DivergedRow(error.step, tokens=self.account.tokens(self.step), reason=error.reason))
            raise
        finally:
            for observer in self.observers:
                observer.end()
        return self.done

    def train_step(self) -> None:
        """One optimizer step, and what follows it: the average, a topology update, a row of the metrics.

        Where the loss or the gradient is not finite, on any rank, the optimizer does not step: the batch is skipped.
        """
        alone(self.stepping())

    def stepping(self) -> Passes[None]:
        """As `train_step`, by whoever answers its passes."""
        rate, alpha = self.rate.set(self.optimizer, self.step), self.objective.alpha(self.step)
        update_due = self.sparsifier is not None and self.sparsifier.update_due
        burning_in = self.sparsifier is not None and self.sparsifier.burning_in
        if update_due:
            self.data.prefetch(self.step + 1)
        losses, taught = yield from self._gradients(alpha)
        self.account.step(taught, self.teacher.nnz if self.teacher and taught else 0)
        if self.sparsifier:
            self.sparsifier.before_step()
        is_finite = all(math.isfinite(loss) for loss, *_ in losses)
        norm = yield Step(self.optimizer, self._parameters, self.settings.clip, is_finite)
        stepped = self._count(losses, taught, norm)
        self.step += 1
        if self.done or update_due or not self.account.state_bytes:
            window = self.sparsifier.search.gradients.windows.peak if self.sparsifier else 0
            self.account.measure_state(self.model, self.optimizer, self.teacher, window)
        self._follow(stepped)
        self.optimizer.zero_grad(set_to_none=True)
        if self.done or self.step % self.settings.log_every == 0:
            self._tell(self._averages.row(self.step, self.account, rate, norm, burning_in))

    def _count(self, losses: list[tuple[float, float, float]], taught: int, norm: float) -> bool:
        """Whether the optimizer's step was made: what it takes was finite, alike on all ranks, since it is reduced."""
        numbers = [("the loss", loss) for loss, *_ in losses] + [("the gradient's norm", norm)]
        reason = next((f"{what} is {number}" for what, number in numbers if not math.isfinite(number)), None)
        if reason is None:
            for each in losses:
                self._averages.add(*each, len(losses))
            self._averages.end_step(taught / self.account.tokens_per_step)
            self.account.skipped_in_a_row = 0
            return True
        if self.account.skipped_in_a_row == self.settings.skip_limit:
            raise self.diverged(reason)
        self.account.skip()
        self._tell(SkippedRow(self.step + 1, tokens=self.account.tokens(self.step + 1), reason=reason))
        return False

    def _gradients(self, alpha: float) -> Passes[tuple[list[tuple[float, float, float]], int]]:
        """The gradient of the mean loss over all batches of the step.

        Returns each batch's loss, cross entropy and distillation, and the tokens that the teacher read.

        A batch is divided among the ranks in the order of its sequences, of which the first ones are taught.
        """
        passes, taught_tokens, here = self.settings.accumulation, 0, ranks()
        answered: list[tuple[Tensor, float]] = []
        self.objective.begin_step(self.step)
        for index in range(passes):
            batch = self.data.batches.at(self.step * passes + index)
            rows = batch.shape[0]
            taught = self.objective.taught(self.step, index, rows * here.count)
            own = min(max(0, taught - here.rank * rows), rows)
            parts = yield Pass(self.objective, batch, alpha, own, passes)
            answered.append((torch.stack([part.detach() for part in parts]), own / rows))
            taught_tokens += taught * (batch.shape[1] - 1)
        # Read once a step, since a GPU is waited for.
        losses = []
        numbers = torch.stack([parts for parts, _ in answered]).tolist()
        for (loss, cross_entropy, distillation), (_, share) in zip(numbers, answered, strict=True):
            loss, cross_entropy, distillation = here.means([loss, cross_entropy, distillation * share])
            losses.append((loss, cross_entropy, distillation))
        return losses, taught_tokens

    def _follow(self, stepped: bool) -> None:
        """The teacher's average and the topology's update, after a step that was made or skipped."""
        if self.sparsifier is None:
            if self.teacher:
                self.teacher.update(self.model, self.step - 1, stepped)
            return
        with self.account.watch.of("topology"):
            update = self.sparsifier.after_step(stepped)
        if update is not None:
            self.account.update(update, self.sparsifier.layer_nnz)
            self._tell(update.record)

    def validate(self) -> None:
        """Measure and tell the held-out losses."""
        row = self.validation.measure(self.step, self.account)
        self._require_finite("the validation loss", row.loss)
        if row.teacher_loss is not None:
            self._require_finite("the teacher's validation loss", row.teacher_loss)
        self._tell(row)
        # Validation is not training: it must not slow the tokens per second that are shown.
        self._averages.start_clock(self.step, self.account)

    @property
    def _is_best(self) -> bool:
        """Whether the model as it is was validated, better than before, and such a one is kept."""
        best = self.validation.best
        return self.settings.keep_best and best is not None and best[0] == self.step

    @property
    def done(self) -> bool:
        """Whether the last step was made."""
        return self.step == self.settings.steps

    def diverged(self, reason: str) -> DivergedError:
        """The error of this run where `reason` says what is not finite."""
        return diverged(self.settings, reason, self.step, self.account.flops.total)

    def _require_finite(self, what: str, number: float) -> None:
        if not math.isfinite(number):
            raise self.diverged(f"{what} is {number}")

    def _begin(self) -> None:
        standing = Standing(self.step, self.settings.steps, self.account.updates, self.account.accepted)
        for observer in self.observers:
            observer.begin(standing)
        extension = self.rate.extension
        if self.step == 0:
            self.validate()
            if self.sparsifier:
                self._tell(self.sparsifier.search.initial_row())
        elif extension and self.step == extension.step:
            self._tell(ExtendedRow(**asdict(extension), warmup_steps=extension.warmup_steps))
        self._averages.start_clock(self.step, self.account)

    def _tell(self, row: Row) -> None:
        for observer in self.observers:
            observer.observe(row)

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, and only here."""
        return {
            "objective": self.objective,
            "validation": self.validation,
            "averages": self._averages,
            "account": self.account,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON values: what a checkpoint needs beside model, optimizer, teacher and Sparsifier."""
        return {"step": self.step, **{name: part.state_dict() for name, part in self._parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, after those were loaded."""
        self.step = state["step"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
