"""The scales of every layer over the first steps of a run, root mean squares over tokens and features.

    activation   y_t = W_t x_t + b_t, the output of a layer in step t, counted from 0
    gradient     of the mean loss with respect to y_t
    update       (W_{t+1} - W_t) x_t: what the step, a topology update after it included, changes of the output

The update is taken as the difference of two products of the layer with the same input, before and after the step, so
that no dense weight is made and the connections that were dropped and those that were grown both count; the bias's
change does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config import Config
from sparsae.data import Corpus
from sparsae.errors import DivergedError
from sparsae.experiments.coordinates.record import Quantity
from sparsae.kernels.processor import set_up_processor
from sparsae.models import decoder_and_head
from sparsae.nn.choice import layer_shapes
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.report.readable import short_names
from sparsae.train.assemble import optimizer_of, trainer_of
from sparsae.train.data import TrainData
from sparsae.train.held_out import split_held_out
from sparsae.train.loop import Trainer
from sparsae.train.model import choice_of, choose_device, model_of

EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True)
class Scale:
    """A root mean square of one layer in one step, and the density of the layer then (of the model: others' layers).

    fan_in: how many weights an output of the layer sums, on average; infinite for an embedding, which sums none.
    """

    layer: str
    quantity: Quantity
    step: int
    scale: float
    density: float
    fan_in: float


@dataclass(eq=False)
class Gauge:
    """What goes through a layer in one step: sums of squares and counts of outputs and their gradients, and inputs.

    Loss functions may call the head several times a step. `module.forward` is called where nobody's hooks, those of
    topology rules among them, shall see it.
    """

    module: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    squares: dict[Quantity, float] = field(default_factory=dict)
    counts: dict[Quantity, int] = field(default_factory=dict)
    before: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None

    def see(self, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A call in the training step, of which the backward pass is still to come."""
        (x,) = inputs
        self.inputs.append(x.detach())
        self._add("activation", output.detach())
        output.register_hook(lambda gradient: self._add("gradient", gradient))

    @torch.no_grad()
    def mark(self) -> None:
        """Before the optimizer's step."""
        self.before = [self._product(x) for x in self.inputs]
        bias = getattr(self.module, "bias", None)
        self.bias = None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def compare(self) -> None:
        """After the step: its update."""
        for x, before in zip(self.inputs, self.before, strict=True):
            change = self._product(x) - before
            if self.bias is not None:
                change -= self.module.bias - self.bias  # type: ignore[operator]
            self._add("update", change)

    def take(self) -> dict[Quantity, float]:
        """The root mean squares of the step, which is then forgotten."""
        found = {key: math.sqrt(self.squares[key] / self.counts[key]) for key in self.squares}
        self.inputs, self.before, self.squares, self.counts = [], [], {}, {}
        return found

    def _product(self, x: Tensor) -> Tensor:
        # What a layer gets under autocast may be narrower than its weights.
        wide = x.to(next(self.module.parameters()).dtype) if x.is_floating_point() else x
        y: Tensor = self.module.forward(wide)
        return y

    def _add(self, quantity: Quantity, values: Tensor) -> None:
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        self.squares[quantity] = self.squares.get(quantity, 0.0) + norm * norm
        self.counts[quantity] = self.counts.get(quantity, 0) + values.numel()


def scales(config: Config, corpus: Corpus, stepped: Callable[[], None] = lambda: None) -> Iterator[Scale]:
    """The scales of a run's `training.steps` steps, fewer where it diverges; `stepped` is called after each."""
    set_up_processor(config.training.threads)
    trainer = _trainer(config, corpus)
    gauges = _gauges(trainer.model, config)
    recording = True

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if recording and output.requires_grad:
            by_module[module].see(inputs, output)

    def mark(*_: Any) -> None:
        nonlocal recording
        recording = False
        for gauge in gauges.values():
            gauge.mark()

    by_module = {gauge.module: gauge for gauge in gauges.values()}
    handles = [gauge.module.register_forward_hook(record) for gauge in gauges.values()]
    handles.append(trainer.optimizer.register_step_pre_hook(mark))
    try:
        for step in range(config.training.steps):
            densities = {name: _density(gauge.module, config) for name, gauge in gauges.items()}
            fan_ins = {name: _fan_in(gauge.module) for name, gauge in gauges.items()}
            recording = True
            trainer.train_step()
            for gauge in gauges.values():
                gauge.compare()
            stepped()
            for name, gauge in gauges.items():
                for quantity, scale in gauge.take().items():
                    yield Scale(name, quantity, step, scale, densities[name], fan_ins[name])
    except DivergedError:
        return
    finally:
        for handle in handles:
            handle.remove()


def _gauges(model: nn.Module, config: Config) -> dict[str, Gauge]:
    """Of the embedding, every layer that is sparse or, in a dense model, would be, and the head, in their order."""
    layers: dict[str, nn.Module] = dict(sparse_layers(model)) or choice_of(config).candidates(model)
    head = decoder_and_head(model)[1]
    names = short_names([name for name, layer in layers.items() if layer is not head])
    gauges = {EMBEDDING: Gauge(model.get_input_embeddings())}  # type: ignore[operator]
    gauges |= {short: Gauge(layers[name]) for name, short in names.items()}
    return gauges | {LOGITS: Gauge(head)}


def _density(module: nn.Module, config: Config) -> float:
    return module.topology.density if isinstance(module, SparseLinear) else 1.0 - config.sparsity.sparsity


def _fan_in(module: nn.Module) -> float:
    if isinstance(module, SparseLinear):
        return module.topology.nnz / module.out_features
    return math.inf if isinstance(module, nn.Embedding) else layer_shapes({"": module})[""][1]


def _trainer(config: Config, corpus: Corpus) -> Trainer:
    """The loop of a run with new weights."""
    device = choose_device(config.training.device)
    context = config.model.context
    model = model_of(config, corpus.vocab_size, corpus.tokenizer.eos_id, device)
    nothing = torch.zeros(0, context + 1, dtype=torch.int64, device="cpu")
    data = TrainData.of(config, corpus.train, nothing, split_held_out(corpus.validation, context)[1], device)
    return trainer_of(config, model, optimizer_of(model, config), data, device)
