"""What a language model is trained for: a batch of tokens to the parts of its loss, the same for everybody who asks.

Training, the scores of candidate topologies, validation and evaluation are one forward pass, written once. Autocast,
the teacher, the chunks of the loss and compilation are decided here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.training import TrainingConfig
from sparsae.core.host import on_device, on_host
from sparsae.core.randomness import derive_seed
from sparsae.core.ranks import ranks
from sparsae.errors import InputError
from sparsae.kernels.probe import probed
from sparsae.losses import LossParts, language_model_loss
from sparsae.models import decoder_and_head, hidden_states
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.search.teacher import Teacher, WarmUp
from sparsae.train.micro_batch import MicroBatches
from sparsae.train.reduced import over_ranks
from sparsae.train.stopwatch import Stopwatch

# Modes of torch.compile that make CUDA graphs, and those that differ from them by nothing else.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class Objective:
    """L = CE + alpha KL(teacher || student) of a model, CE without a teacher, for tokens (B, context + 1)."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingConfig,
        device: torch.device,
        *,
        teacher: Teacher | None = None,
        dropout_seed: int | None = None,
    ) -> None:
        """dropout_seed: what each step's dropout is drawn from; None: the model has none."""
        self.model, self.teacher, self.device = model, teacher, device
        self._settings, self._dropout_seed = settings, dropout_seed
        self._warmup = WarmUp(teacher.config, settings.steps) if teacher else None
        # False: forward and backward passes are computed with those of other runs, and little is left for a graph.
        self.compiles_alone, self._compiled = True, dict[str, Any]()
        self._loss = over_ranks(model, self._own_loss)

    def _trained(self) -> Any:
        """The decoder as it is trained and scored now."""
        decoder, mode = decoder_and_head(self.model)[0], self.compile_mode
        if mode is None or not self.compiles_alone:
            return decoder
        # What a CUDA graph repeats is what the GPU did: nothing that looks at a backward pass from Python hears of it.
        if mode in _WITHOUT_GRAPHS and probed(layer.key for layer in sparse_layers(decoder).values()):
            mode = _WITHOUT_GRAPHS[mode]
        if mode not in self._compiled:
            # An update may change a layer's number of values: one graph for all numbers, not one for each.
            torch._dynamo.config.force_parameter_static_shapes = False
            self._compiled[mode] = torch.compile(decoder, dynamic=None, mode=mode)
        return self._compiled[mode]

    def begin_step(self, step: int) -> None:
        """Training mode, with the dropout of that step (counted from 0)."""
        if not self.model.training:
            self.model.train()
        if self._dropout_seed is not None:
            # Each rank drops other things; the first one what one rank does.
            others = [ranks().rank] if ranks().rank else []
            torch.manual_seed(derive_seed(self._dropout_seed, "dropout", step, *others))

    def alpha(self, step: int) -> float:
        """The weight of the KL term at a step counted from 0; 0 without a teacher."""
        return self._warmup.alpha(step) if self._warmup else 0.0

    def taught(self, step: int, index: int, rows: int) -> int:
        """How many of the `rows` sequences of a step's forward pass `index` are taught; see `WarmUp.taught`."""
        if not self.alpha(step):
            return 0
        assert self._warmup is not None
        return self._warmup.taught(step, index, self._settings.accumulation, rows)

    @property
    def precision(self) -> str:
        """Of the arithmetic, by autocast."""
        return self._settings.precision

    @property
    def compile_mode(self) -> str | None:
        """Of torch.compile; None: nothing is compiled."""
        return self._settings.compile_mode if self._settings.compile else None

    @property
    def loss_chunk(self) -> int:
        """Tokens whose logits exist at a time."""
        return self._settings.loss_chunk

    def loss(
        self, batch: Tensor, alpha: float, taught: int | None = None, hidden_TD: Tensor | None = None
    ) -> LossParts:
        """What is trained, with the KL term at this weight; its gradients are means over the ranks.

        taught: how many sequences are, the first ones; None: all. The weight is that of a mean over all sequences: what
        is left out of it is made up for, so that it is the same over the steps whatever the share. hidden_TD: the
        decoder's hidden states, where they exist already.
        """
        return self._loss(batch, alpha, taught, hidden_TD)

    def _own_loss(self, batch: Tensor, alpha: float, taught: int | None, hidden_TD: Tensor | None) -> LossParts:
        rows = batch.shape[0]
        if taught is not None and self.teacher:
            alpha *= taught / (rows * self.teacher.config.share)
        return self._parts(
            self.model,
            self._trained(),
            batch,
            alpha=alpha,
            taught=rows if taught is None else taught,
            hidden_TD=hidden_TD,
        )

    def score(self, batch: Tensor) -> Tensor:
        """Mean cross entropy, differentiable in the sparse layers: a dense head's gradient is nobody's concern here."""
        is_sparse = isinstance(decoder_and_head(self.model)[1], SparseLinear)
        return self._parts(self.model, self._trained(), batch, head_gradient=is_sparse).total

    @torch.no_grad()
    def cross_entropy(self, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        """Mean cross entropy of the model (or another) as it is, in nats a token: a number that may be on its way."""
        model = model or self.model
        return self._parts(model, decoder_and_head(model)[0], batch).cross_entropy

    def mean(self, rows: Tensor, model: nn.Module | None = None) -> float:
        """Mean cross entropy over rows (N, context + 1), a batch at a time, each rank having its share of these."""
        here = ranks()
        batches = rows.split(max(1, self._settings.batch_size // here.count))[here.rank :: here.count]
        losses = on_host([self.cross_entropy(batch, model) for batch in batches])
        total = sum(float(loss) * batch.shape[0] for loss, batch in zip(losses, batches, strict=True))
        return here.means([total])[0] * here.count / rows.shape[0]

    def validate(self, rows: Tensor) -> tuple[float, float | None]:
        """Means over held-out rows of the model, in evaluation mode from then on, and of the teacher; see `mean`.

        An improvement may end the warm-up.
        """
        self.model.eval()
        loss = self.mean(rows)
        if self._warmup:
            self._warmup.observe(loss)
        return loss, self.mean(rows, self.teacher.model) if self.teacher and self.teacher.begun else None

    def _parts(
        self,
        model: nn.Module,
        decoder: Any,
        batch: Tensor,
        *,
        alpha: float = 0.0,
        taught: int = 0,
        head_gradient: bool = True,
        hidden_TD: Tensor | None = None,
    ) -> LossParts:
        """decoder: the model's, or what it was compiled to. taught: sequences that the teacher reads."""
        batch = self.on_device(batch)
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._settings.precision == "bfloat16"):
            teacher_hidden = teacher_head = None
            if alpha > 0 and self.teacher:
                teacher_decoder, teacher_head = decoder_and_head(self.teacher.model)
                with torch.no_grad():
                    teacher_hidden = hidden_states(teacher_decoder, inputs[:taught])
            return language_model_loss(
                hidden_states(decoder, inputs) if hidden_TD is None else hidden_TD,
                decoder_and_head(model)[1],
                targets,
                teacher_hidden_TD=teacher_hidden,
                teacher_head=teacher_head,
                alpha=alpha,
                chunk=self._settings.loss_chunk,
                ignore_index=None,
                head_gradient=head_gradient,
            )

    def on_device(self, batch: Tensor) -> Tensor:
        """A batch where the model is."""
        return on_device(batch, self.device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and teacher: how far the warm-up is."""
        return {"warmup": self._warmup.state_dict()} if self._warmup else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        if self._warmup:
            self._warmup.load_state_dict(state["warmup"])


@dataclass(frozen=True, eq=False)
class HeldOutScore:
    """The score of a topology: mean cross entropy on the micro-batch of the update at a step."""

    objective: Objective
    micro_batches: MicroBatches

    def __call__(self, step: int) -> Tensor:
        """A scalar with gradient."""
        return self.objective.score(self.micro_batches.at(step))


@dataclass(frozen=True, eq=False)
class HeldOutStudy:
    """What scores are compared with: mean cross entropy on all validation rows, its time counted as "study"."""

    objective: Objective
    rows: Tensor
    watch: Stopwatch

    def __call__(self) -> float:
        with self.watch.of("study"):
            return self.objective.mean(self.rows)


@contextmanager
def failed_compilation_is_told() -> Iterator[None]:
    """What torch.compile cannot make code of inside becomes an InputError: on a machine without a compiler, say."""
    try:
        yield
    except RuntimeError as error:
        # By name: importing the compiler takes a second, which a run without it does not have to wait.
        if all(kind.__name__ != "BackendCompilerFailed" for kind in type(error).__mro__):
            raise
        reason = " ".join(str(error).strip().split("\n\n")[0].split())[:300]
    else:
        return
    raise InputError(f"training.compile: torch.compile failed ({reason}): set it to false, or mend that")
