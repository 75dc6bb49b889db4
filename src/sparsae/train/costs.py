"""The analytic cost of a run, step by step: what each step and each update computes, at the sparsity of that moment."""

from __future__ import annotations

import math

from torch import nn

from sparsae.config.rules import MicroBatchConfig
from sparsae.config.schema import Config, ModelConfig
from sparsae.core.accounting import FlopCounter, ModelCost, gradient_at
from sparsae.families import FAMILIES
from sparsae.models import decoder_and_head
from sparsae.nn.choice import layer_shapes, linear_layers
from sparsae.nn.linear import sparse_layers
from sparsae.search.updates import SearchCost


class RunCosts:
    """Counts operations for a model with `nnz` active weights, a number that has to follow it when it is pruned."""

    def __init__(self, model: nn.Module, config: Config, micro_batch: MicroBatchConfig | None) -> None:
        self.cost = model_cost(model, config.model)
        self.nnz = sum(layer.topology.nnz for layer in sparse_layers(model).values())
        self._scoring_tokens = micro_batch.sequences * config.model.context if micro_batch else 0

    @property
    def density(self) -> float:
        """Active share of the sparse layers' weights; 1 where there are none."""
        return self.nnz / self.cost.sparse_weights if self.cost.sparse_weights else 1.0

    def count_step(self, flops: FlopCounter, tokens: int, taught_tokens: int, teacher_nnz: int) -> None:
        """One optimizer step, with a teacher of `teacher_nnz` weights in the sparse layers for some of its tokens."""
        flops.add("student", self.cost.training(self.nnz, tokens))
        flops.dense_equivalent += self.cost.dense_training(tokens)
        flops.add("teacher", self.cost.forward(teacher_nnz, taught_tokens))

    def count_update(self, flops: FlopCounter, spent: SearchCost) -> None:
        """One topology update: scored candidates, and gradients at inactive positions."""
        plain = spent.forwards - spent.backwards
        flops.add("search", plain * self.cost.scoring(self.nnz, self._scoring_tokens, with_gradient=False))
        flops.add("search", spent.backwards * self.cost.scoring(self.nnz, self._scoring_tokens, with_gradient=True))
        flops.add("dense_gradients", sum(gradient_at(weights, tokens) for weights, tokens in spent.probed.values()))

    def count_study(self, flops: FlopCounter, spent: SearchCost, tokens: int) -> None:
        """Candidates that were scored on `tokens` tokens of validation text besides."""
        flops.study += spent.studied * self.cost.forward(self.nnz, tokens)


def model_cost(model: nn.Module, config: ModelConfig) -> ModelCost:
    """From the model's layers; the head counts where it is a dense matrix, tied or not."""
    sparse = sparse_layers(model)
    head = decoder_and_head(model)[1]
    dense = sum(math.prod(shape) for shape in layer_shapes(linear_layers(model)).values())
    return ModelCost(
        sparse_weights=sum(math.prod(layer.topology.shape) for layer in sparse.values()),
        dense_weights=dense,
        head_weights=0 if head in sparse.values() else math.prod(layer_shapes({"": head})[""]),
        attention_layers=config.layers,
        width=config.heads * FAMILIES[config.family].head_size(config),
        context=config.context,
    )
