"""What goes along with a model that somebody else's trainer trains: the Sparsifier, its teacher, and what they report.

The callbacks of all trainers are this, and the trainer's own hooks around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sparsae.config.complaints import explain, nearest
from sparsae.config.rules import MicroBatchConfig, RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.ranks import ranks
from sparsae.errors import InputError, require_state
from sparsae.integrations.held_out import Collate, HeldOutBatches
from sparsae.losses import summed_divergence
from sparsae.nn.linear import sparse_layers
from sparsae.parameterization import Parameterization
from sparsae.report.topology import write_topology
from sparsae.rules import build_rule
from sparsae.rules.parts.rule import Rule
from sparsae.runs.rows import TopologyRow, read_row
from sparsae.search.guests import as_rule
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.teacher import WarmUp
from sparsae.search.updates import Update

log = logging.getLogger(__name__)

# The mean loss, a scalar, of a model on a batch.
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Circumstances:
    """What the trainer knows. steps: of the whole training; passes: backward passes an optimizer step.

    steps_per_epoch: None where nobody knows. is_even: whether every step has as many passes, also the last of an epoch.
    scaler: of gradients. move: a batch to the model's device. precision: what forward passes are made in.
    """

    steps: int
    passes: int = 1
    is_even: bool = True
    steps_per_epoch: int | None = None
    scaler: torch.amp.GradScaler | None = None
    move: Callable[[Any], Any] = lambda batch: batch
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext


class Companion:
    """A Sparsifier from the beginning of a training to its end. records: of the first topology and of updates."""

    def __init__(
        self,
        *,
        rule: Rule[Any] | RuleConfig | None,
        held_out: Any,
        collate: Collate,
        loss: LossFunction | None,
        heads: Mapping[str, HeadLayout] | None,
        parameterization: Parameterization | None,
        on_update: Callable[[Update], object] | None,
        settings: Mapping[str, Any],
    ) -> None:
        """settings: of SparsifierConfig, but those that the trainer knows.

        Raises InputError for settings that are wrong, for a rule that scores candidates where there is nothing held
        out, or no loss on it, and for something held out that the rule does not look at.
        """
        self._settings = dict(settings)
        self._config = _validated(settings)
        self._rule, self._heads, self._parameterization = rule, heads, parameterization
        self._on_update, self._loss = on_update, loss
        made = build_rule(self._config.topology, self._config.rules) if rule is None else as_rule(rule)
        self.moves = made.moves or self._config.schedule.kind != "constant"
        self._batches = _held_out(made, held_out, collate, loss, self._config.seed)
        self._sparsifier: Sparsifier | None = None
        self.records: list[TopologyRow] = []

    @property
    def sparsifier(self) -> Sparsifier:
        """Raises InputError before the training begins."""
        if self._sparsifier is None:
            raise InputError("there is no Sparsifier yet: the trainer makes it when training begins")
        return self._sparsifier

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, around: Circumstances) -> None:
        """Attach a Sparsifier to the optimizer; one of a training before is closed. Raises InputError as that does."""
        self.end()
        # Fewer passes than the rule counts on would leave it without a gradient; with 1 it looks at each, and the last
        # counts.
        config = SparsifierConfig(
            **self._settings,
            steps=around.steps,
            steps_per_epoch=around.steps_per_epoch,
            accumulation=around.passes if around.is_even else 1,
        )
        self._around, self._config = around, config

        def score(step: int) -> Tensor:
            assert self._batches is not None
            assert self._loss is not None
            with around.precision():
                return self._loss(model, around.move(self._batches.at(step)))

        self._sparsifier = Sparsifier(
            model,
            optimizer,
            config,
            rule=self._rule,
            score=None if self._batches is None else score,
            heads=self._heads,
            parameterization=self._parameterization,
        ).attach(self._note, around.scaler)
        self._warm_up = WarmUp(config.teacher, config.steps)
        self.records = [self._sparsifier.search.initial_row()]
        self._passed = (0, 0)  # a step, and how many of its passes the teacher was asked for
        self._is_heard = self._is_warned = False
        self._divergence, self._taught = 0.0, 0

    @property
    def waits_for_validation(self) -> bool:
        """Whether the teacher's warm-up is one that a validation loss has still to end."""
        teacher = self._config.teacher
        return (
            bool(teacher.enabled and teacher.alpha and teacher.warmup == "validation")
            and not self._warm_up.over_by_validation
        )

    def warn_of(self, monitor: str, why: str) -> None:
        """Say, once in a training, that no validation ends the warm-up which waits for one."""
        if self.waits_for_validation and not self._is_warned:
            self._is_warned = True
            what = "%s, which ends the teacher's warm-up: %s; name one as monitor, or let teacher.warmup be fraction"
            log.warning(what, monitor, why)

    def end(self) -> None:
        """Let go of the optimizer; the Sparsifier may still be looked at."""
        if self._sparsifier is not None:
            self._sparsifier.close()

    def stepped(self, advice: str) -> None:
        """After the trainer's step. Raises InputError where there is a teacher, and nobody asked for its loss."""
        if self._config.teacher.enabled and self._config.teacher.alpha and not self._is_heard:
            raise InputError(f"the teacher has no part in the loss, which a callback cannot change: {advice}")

    def validated(self, loss: float | None) -> None:
        """Take note of a validation loss, which may end the warm-up of the teacher.

        loss: this rank's; what counts is the mean over those that have one. None: a rank that has none.
        """
        found = [each for each in ranks().gather(loss, "losses") if each is not None]
        if found:
            self._warm_up.observe(sum(found) / len(found))

    def distillation(
        self, logits: Tensor, *inputs: Any, counted: Tensor | None = None, total: Any = None, **named: Any
    ) -> Tensor:
        """alpha KL(teacher || student), to be added to the loss of this backward pass: 0 in steps that are not taught.

        logits: the student's, (sequences, ..., classes). inputs, named: what it was called with; the teacher gets the
        sequences that are taught. counted: (sequences, ...) of bool, where KL counts; None: everywhere. total: what the
        sum is divided by; None: as many as count, so that it is a mean over tokens.

        Ranks have their parts of one batch, of whose sequences the first are taught, and their loss is a mean over
        them: it is what one rank with the whole batch adds. All of them have to come here.
        """
        self._is_heard = True
        teacher, step, here = self.sparsifier.teacher, self.sparsifier.step, ranks()
        if teacher is None:
            return logits.new_zeros(())
        index = self._passed[1] % self._around.passes if self._passed[0] == step else 0
        self._passed = step, index + 1
        alpha = self._warm_up.alpha(step) if teacher.begun else 0.0
        if not alpha:
            return logits.new_zeros(())
        taught_rows = self._warm_up.taught(step, index, self._around.passes, len(logits) * here.count)
        rows = min(max(0, taught_rows - here.rank * len(logits)), len(logits))

        def first(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.dim() and len(value) == len(logits)
            return value[:rows] if is_batched else value

        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if counted is None else counted
        taught, divergence = counted[:rows], logits.new_zeros(())
        if rows:
            with torch.no_grad():
                found = teacher.model(*map(first, inputs), **{name: first(value) for name, value in named.items()})
            divergence = summed_divergence(logits, logits_of(found), taught.flatten())
        own = [float(divergence.detach()), int(taught.sum()), int(counted.sum())]
        divergences, tokens, all_tokens = here.means(own, "distillation")
        if not tokens:
            return logits.new_zeros(())
        self._divergence, self._taught = self._divergence + divergences / tokens, self._taught + 1
        # A share of the sequences stands for all of them.
        mean = divergence / tokens
        return alpha * (mean if total is None else mean * all_tokens / total)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as a run of the program has them in metrics.jsonl."""
        return [record.to_dict() for record in self.records]

    def metrics(self) -> dict[str, float]:
        """Where the topology is; and the mean divergence from the teacher since this was asked last."""
        row = self.records[-1]
        found = {
            "nnz": row.nnz,
            "density": row.nnz / sum(layer.units for layer in row.layers.values()),
            "updates": sum(update.accepted for update in self.records),
            "swaps": sum(update.swaps for update in self.records),
            "hamming_start": row.hamming_start,
            "itop_rate": row.itop_rate,
        }
        if self._taught:
            found["distillation"] = self._divergence / self._taught
            self._divergence, self._taught = 0.0, 0
        return {f"sparsae/{name}": value for name, value in found.items()}

    def write_page(self, folder: Path, title: str) -> None:
        """topology.html in a folder of the trainer's. Raises InputError where it cannot be written."""
        page = folder / "topology.html"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_topology(page, title, self.records)
        except OSError as error:
            raise InputError(f"{page}: cannot be written: {error.strerror}") from None

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and tensors that are no copies."""
        return {
            "sparsifier": self.sparsifier.state_dict(),
            "warm_up": self._warm_up.state_dict(),
            "rows": self.rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, after model and optimizer were loaded. Raises InputError as the Sparsifier does."""
        require_state("SparsaeCallback", state, ("sparsifier", "warm_up", "rows"))
        self.sparsifier.load_state_dict(state["sparsifier"])
        self._warm_up.load_state_dict(state["warm_up"])
        found = [read_row(row, "the state of SparsaeCallback: rows") for row in state["rows"]]
        self.records = [row for row in found if isinstance(row, TopologyRow)]

    def _note(self, update: Update) -> None:
        self.records.append(update.record)
        if self._on_update is not None:
            self._on_update(update)


class CompanionCallback:
    """What the callbacks of all trainers are besides the trainer's own hooks."""

    def __init__(
        self,
        *,
        rule: Rule[Any] | RuleConfig | None = None,
        held_out: Any = None,
        collate: Collate,
        loss: LossFunction | None = None,
        heads: Mapping[str, HeadLayout] | None = None,
        parameterization: Parameterization | None = None,
        on_update: Callable[[Update], object] | None = None,
        **settings: Any,
    ) -> None:
        """settings: as SparsifierConfig has them (`topology`, `teacher`, `seed`, ...), but what the trainer knows.

        held_out: a data set of which candidates are scored, where the rule scores any. collate: a list of its samples
        as a batch. loss: the mean loss of the sparse model on such a batch. rule, heads, parameterization: as
        Sparsifier has them. on_update: called with every update of the topology.

        Raises InputError for wrong settings, and where `held_out` or `loss` is missing, or not wanted.
        """
        self._companion = Companion(
            rule=rule,
            held_out=held_out,
            collate=collate,
            loss=loss,
            heads=heads,
            parameterization=parameterization,
            on_update=on_update,
            settings=settings,
        )

    @property
    def sparsifier(self) -> Sparsifier:
        """The search, from the beginning of training on; afterwards too, to be looked at. Raises InputError before."""
        return self._companion.sparsifier

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the first topology and of every update, as a run of the program has them in metrics.jsonl."""
        return self._companion.rows

    def metrics(self) -> dict[str, float]:
        """Where the topology is, for loggers; and the mean divergence from the teacher since this was asked last."""
        return self._companion.metrics()

    def distillation(
        self, logits: Tensor, *inputs: Any, counted: Tensor | None = None, total: Any = None, **named: Any
    ) -> Tensor:
        """What the teacher adds to the loss of a backward pass, where a trainer's own loss is not enough.

        Arguments as `Companion.distillation` has them.
        """
        return self._companion.distillation(logits, *inputs, counted=counted, total=total, **named)


def logits_of(output: Any) -> Tensor:
    """The logits that a model returned: a tensor, or the field `logits`. Raises InputError for neither."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InputError(f"the model returns no logits, which the teacher is compared by, but {type(output).__name__}")
    return logits


def refuse_dense(model: nn.Module) -> None:
    """Raise InputError, before the trainer has made anything, for a model that is not sparse."""
    if not sparse_layers(model):
        raise InputError("SparsaeCallback: the model has no sparse layer: call sparsify(model, ...) before the trainer")


def _validated(settings: Mapping[str, Any]) -> SparsifierConfig:
    known = [name for name in SparsifierConfig.model_fields if name not in ("steps", "accumulation", "steps_per_epoch")]
    for name in settings:
        if name in SparsifierConfig.model_fields and name not in known:
            raise InputError(f"SparsaeCallback: {name}: the trainer knows it: leave it out")
        if name not in known:
            raise InputError(f"SparsaeCallback: {name}: no such setting; {nearest(name, known)}")
    try:
        return SparsifierConfig.model_validate({**settings, "steps": 1})
    except ValidationError as errors:
        first = errors.errors(include_url=False)[0]
        raise InputError(explain(first, first["loc"], {(str(first["loc"][0]),): "SparsaeCallback"})) from None


def _held_out(
    rule: Rule[Any], samples: Any, collate: Collate, loss: LossFunction | None, seed: int
) -> HeldOutBatches | None:
    if not rule.needs & {"loss", "candidate_gradient"}:
        if samples is not None:
            raise InputError(f"held_out: rule '{rule.name}' scores no candidates: leave it out")
        return None
    if samples is None:
        raise InputError(
            f"rule '{rule.name}' compares candidates by their loss on held-out data: "
            "give SparsaeCallback(held_out=...), a data set that training does not see"
        )
    if loss is None:
        raise InputError(
            f"rule '{rule.name}' compares candidates by their loss: give SparsaeCallback(loss=...), a function of the "
            "model and a held-out batch"
        )
    return HeldOutBatches(samples, collate, rule.micro_batch or MicroBatchConfig(), seed)
