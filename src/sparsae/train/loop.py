"""The training loop. It knows batches, a loss, an optimizer, a Sparsifier and a teacher, and no method by name."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sparsae.config.schema import Config
from sparsae.core.accounting import FlopCounter
from sparsae.core.cadence import cosine_with_warmup
from sparsae.data.batches import Batches
from sparsae.errors import DivergedError
from sparsae.nn.linear import sparse_layers
from sparsae.train.costs import RunCosts
from sparsae.train.manifest import Extension
from sparsae.train.memory import state_bytes
from sparsae.train.micro_batch import MicroBatches
from sparsae.train.objective import Objective
from sparsae.train.progress import Display
from sparsae.train.rundir import MetricsWriter
from sparsae.train.sparsifier import Sparsifier
from sparsae.train.stopping import StopRequest
from sparsae.train.stopwatch import Stopwatch
from sparsae.train.trackers import Trackers


class Trainer:
    """One run from its present step to its end; `state` and `restore` carry it over a stop."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        sparsifier: Sparsifier | None,
        batches: Batches,
        validation: Tensor,
        micro_batches: MicroBatches | None,
        costs: RunCosts,
        watch: Stopwatch,
        metrics: MetricsWriter,
        trackers: Trackers,
        display: Display,
        extension: Extension | None = None,
    ) -> None:
        self.config, self.settings = config, config.training
        self.objective, self.optimizer, self.sparsifier = objective, optimizer, sparsifier
        self.model, self.teacher, self.device = objective.model, objective.teacher, objective.device
        self.batches, self.validation, self.micro_batches, self.costs = batches, validation, micro_batches, costs
        self.metrics, self.trackers, self.display, self.watch = metrics, trackers, display, watch
        self.extension = extension
        self.step = self.updates = self.accepted = 0
        self.flops = FlopCounter()
        self.validation_loss = self.untrained_loss = math.nan
        self.teacher_loss: float | None = None
        self.state_bytes: dict[str, int] = {}
        self._sums = {"cross_entropy": 0.0, "distillation": 0.0, "loss": 0.0, "steps": 0, "taught_steps": 0}
        self._window = (time.perf_counter(), 0)

    @property
    def tokens(self) -> int:
        """Training tokens so far."""
        return self.step * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.settings.batch_size * self.settings.accumulation * self.config.model.context

    def run(self, stop: StopRequest, save: Any) -> bool:
        """Train until the last step (True) or until a stop is requested (False); `save()` writes a checkpoint.

        Raises DivergedError where a loss or a gradient is not finite.
        """
        steps = self.settings.steps
        self.display.begin(self.step, steps)
        if self.step == 0:
            self._validate()
            if self.sparsifier:
                self._record(self.sparsifier.search.initial_row())
        elif self.extension and self.step == self.extension.step:
            self._record({"kind": "extended", **asdict(self.extension), "warmup_steps": self.extension.warmup_steps})
        self._window = (time.perf_counter(), self.step)
        saved, saved_at = self.step, time.monotonic()
        try:
            while self.step < steps and stop.signal is None:
                with self.watch.of("train"):
                    self.train_step()
                if self.step % self._validate_every == 0 or self.step == steps:
                    self._validate()
                if self._checkpoint_due(time.monotonic() - saved_at):
                    save()
                    saved, saved_at = self.step, time.monotonic()
        finally:
            self.display.close()
        if self.step != saved:
            save()
        return self.step == steps

    def _checkpoint_due(self, seconds: float) -> bool:
        """Whether the step that was done is to be saved, so many seconds after the last one that was."""
        every, minutes = self.settings.checkpoint_every, self.settings.checkpoint_minutes
        return bool(every and self.step % every == 0) or bool(minutes and seconds >= 60.0 * minutes)

    @property
    def _validate_every(self) -> int:
        return self.settings.validate_every or max(10, self.settings.steps // 10)

    def train_step(self) -> None:
        """One optimizer step, and what follows it: the average, a topology update, a row of the metrics."""
        step, settings = self.step, self.settings
        rate = settings.learning_rate * cosine_with_warmup(
            step, settings.steps, settings.warmup, settings.final_learning_rate
        )
        if self.extension and step >= self.extension.step:
            rate *= self.extension.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        alpha = self.objective.alpha(step)
        update_due = self.sparsifier is not None and self.sparsifier.update_due
        if self.micro_batches and update_due:
            self.micro_batches.prefetch(step + 1)
        self.objective.begin_step(step)
        for micro in range(settings.accumulation):
            parts = self.objective.loss(self.batches.at(step * settings.accumulation + micro), alpha)
            (parts.total / settings.accumulation).backward()
            loss, cross_entropy, distillation = torch.stack([part.detach() for part in parts]).tolist()
            self._require_finite("the loss", loss)
            self._sums["loss"] += loss / settings.accumulation
            self._sums["cross_entropy"] += cross_entropy / settings.accumulation
            self._sums["distillation"] += distillation / settings.accumulation
        self._sums["steps"] += 1
        self._sums["taught_steps"] += alpha > 0
        burning_in = self.sparsifier is not None and self.sparsifier.burning_in
        self.costs.count_step(self.flops, self.tokens_per_step, self.teacher.nnz if self.teacher and alpha else None)
        if self.sparsifier:
            self.sparsifier.before_step()
        norm = self._clip()
        self._require_finite("the gradient's norm", float(norm))
        self.optimizer.step()
        last = step + 1 == settings.steps
        if last or update_due or not self.state_bytes:
            self._measure_state()
        self.step += 1
        self._follow()
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % settings.log_every == 0 or last:
            self._log(rate, norm, burning_in)

    def _follow(self) -> None:
        """The teacher's average and the topology's update."""
        if self.sparsifier is None:
            if self.teacher:
                self.teacher.update(self.model, self.step - 1)
            return
        with self.watch.of("topology"):
            update = self.sparsifier.after_step()
        if update is None:
            return
        self.updates += 1
        self.accepted += update.accepted
        self.costs.count_update(self.flops, update.cost)
        self.costs.count_study(self.flops, update.cost, self.validation[:, 1:].numel())
        self.costs.nnz = self.sparsifier.nnz
        self._record(update.row)
        self.display.topology(self.updates, self.accepted if self.sparsifier.search.rule.declines else None)

    def _clip(self) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return norm

    def _validate(self) -> None:
        with self.watch.of("validation"):
            self.validation_loss, self.teacher_loss = self.objective.validate(self.validation)
        self._require_finite("the validation loss", self.validation_loss)
        if self.teacher_loss is not None:
            self._require_finite("the teacher's validation loss", self.teacher_loss)
        if self.step == 0:
            self.untrained_loss = self.validation_loss
        row = {
            "kind": "validation",
            "step": self.step,
            "tokens": self.tokens,
            "loss": self.validation_loss,
            "perplexity": perplexity(self.validation_loss),
            "teacher_loss": self.teacher_loss,
            "train_flops": self.flops.total,
            "seconds": self.watch.total,
        }
        self._record(row)
        self.display.validation(row)
        # Validation is not training: it must not slow the tokens per second that are shown.
        self._window = (time.perf_counter(), self.step)

    def _require_finite(self, what: str, number: float) -> None:
        if not math.isfinite(number):
            raise self.diverged(f"{what} is {number}")

    def diverged(self, reason: str) -> DivergedError:
        """The error of a run that cannot go on from where it is; `reason` says what is not finite."""
        settings = self.settings
        clip = "set training.clip" if settings.clip is None else f"training.clip (now {settings.clip:g})"
        return DivergedError(
            f"training diverged: {reason} at step {self.step}; lower training.learning_rate "
            f"(now {settings.learning_rate:g}) or {clip}",
            self.step,
            self.flops.total,
            reason,
        )

    def _log(self, rate: float, norm: Tensor, burning_in: bool) -> None:
        steps, taught = self._sums["steps"], self._sums["taught_steps"]
        started, first = self._window
        now = time.perf_counter()
        row = {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            "loss": self._sums["loss"] / steps,
            "cross_entropy": self._sums["cross_entropy"] / steps,
            "distillation": self._sums["distillation"] / taught if taught else None,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "nnz": self.costs.nnz,
            "density": self.costs.density,
            "burn_in": burning_in,
            "train_flops": self.flops.total,
            "seconds": self.watch.total,
            "tokens_per_second": (self.step - first) * self.tokens_per_step / (now - started),
        }
        self._sums = dict.fromkeys(self._sums, 0)
        self._window = (now, self.step)
        self._record(row)
        self.display.train(row, self.settings.steps)

    def _record(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.trackers.log(row)

    def _measure_state(self) -> None:
        """While gradients are alive; the largest that was seen counts, since a union teacher grows."""
        teacher = self.sparsifier.teacher if self.sparsifier else None
        now = state_bytes(sparse_layers(self.model), self.optimizer, teacher.layers if teacher else None)
        if sum(now.values()) >= sum(self.state_bytes.values()):
            self.state_bytes = now

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of the loop itself, as JSON values."""
        return {
            "step": self.step,
            "updates": self.updates,
            "accepted": self.accepted,
            "flops": self.flops.to_dict(),
            "seconds": self.watch.state_dict(),
            "objective": self.objective.state_dict(),
            "sums": self._sums,
            "untrained_loss": self.untrained_loss,
            "validation_loss": self.validation_loss,
            "teacher_loss": self.teacher_loss,
            "state_bytes": self.state_bytes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`, after model, optimizer, teacher and Sparsifier were restored."""
        self.step, self.updates, self.accepted = state["step"], state["updates"], state["accepted"]
        self.flops = FlopCounter.from_dict(state["flops"])
        self.watch.load_state_dict(state["seconds"])
        self.objective.load_state_dict(state["objective"])
        self._sums = dict(state["sums"])
        # Of a run that was saved before its first validation they are null.
        self.untrained_loss, self.validation_loss = (
            math.nan if loss is None else loss for loss in (state["untrained_loss"], state["validation_loss"])
        )
        self.teacher_loss, self.state_bytes = state["teacher_loss"], dict(state["state_bytes"])


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
