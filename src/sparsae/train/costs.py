"""The analytic cost of a run, step by step: what each step and each update computes, at the sparsity of that moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from torch import nn

from sparsae.config.rules import MicroBatchConfig
from sparsae.config.schema import Config, ModelConfig
from sparsae.core.accounting import FlopCounter, ModelCost, gradient_at
from sparsae.families import FAMILIES
from sparsae.models import decoder_and_head
from sparsae.nn.choice import layer_shapes, linear_layers, linear_routers
from sparsae.nn.linear import sparse_layers
from sparsae.nn.routing import Routing
from sparsae.search.updates import SearchCost


class RunCosts:
    """Counts operations for a model with `nnz` active weights, which have to `follow` it when it is pruned.

    met: how many of them a token meets; fewer than there are where a router chooses among experts.
    """

    def __init__(self, model: nn.Module, config: Config, micro_batch: MicroBatchConfig | None) -> None:
        self.cost, self._routing = model_cost(model, config.model), Routing(model)
        self.follow({name: layer.topology.nnz for name, layer in sparse_layers(model).items()})
        self._scoring_tokens = micro_batch.sequences * config.model.context if micro_batch else 0

    @property
    def density(self) -> float:
        """Active share of the sparse layers' weights; 1 where there are none."""
        return self.nnz / self.cost.sparse_weights if self.cost.sparse_weights else 1.0

    def follow(self, nnz: Mapping[str, int], total: int | None = None) -> None:
        """From now on the layers have so many active weights; total: exactly, where those are rounded."""
        each, met = sum(nnz.values()), self._routing.met(nnz)
        self.nnz = each if total is None else total
        self.met = met if self.nnz == each else round(met * self.nnz / each)

    def share(self, layer: str) -> Fraction:
        """The share of the tokens that a layer sees."""
        return self._routing.share(layer)

    def count_step(self, flops: FlopCounter, tokens: int, taught_tokens: int, teacher_nnz: int) -> None:
        """One optimizer step, with a teacher of `teacher_nnz` weights in the sparse layers for some of its tokens."""
        flops.add("student", self.cost.training(self.met, tokens))
        flops.dense_equivalent += self.cost.dense_training(tokens)
        # A teacher's weights lie as the student's do, or nearly.
        met = teacher_nnz if self.met == self.nnz else round(teacher_nnz * self.met / self.nnz)
        flops.add("teacher", self.cost.forward(met, taught_tokens))

    def count_update(self, flops: FlopCounter, spent: SearchCost) -> None:
        """One topology update: scored candidates, and gradients at inactive positions."""
        plain = spent.forwards - spent.backwards
        flops.add("search", plain * self.cost.scoring(self.met, self._scoring_tokens, with_gradient=False))
        flops.add("search", spent.backwards * self.cost.scoring(self.met, self._scoring_tokens, with_gradient=True))
        flops.add("dense_gradients", sum(gradient_at(weights, tokens) for weights, tokens in spent.probed.values()))

    def count_study(self, flops: FlopCounter, spent: SearchCost, tokens: int) -> None:
        """Candidates that were scored on `tokens` tokens of validation text besides."""
        flops.study += spent.studied * self.cost.forward(self.met, tokens)


def model_cost(model: nn.Module, config: ModelConfig) -> ModelCost:
    """From the model's layers; the head counts where it is a dense matrix, tied or not. Routers see every token."""
    sparse, routing = sparse_layers(model), Routing(model)
    head = decoder_and_head(model)[1]
    dense = {name: math.prod(shape) for name, shape in layer_shapes(linear_layers(model)).items()}
    routers = {name: math.prod(shape) for name, shape in layer_shapes(linear_routers(model)).items()}
    whole = {name: math.prod(layer.topology.shape) for name, layer in sparse.items()}
    return ModelCost(
        sparse_weights=sum(whole.values()),
        met_weights=routing.met(whole),
        dense_weights=routing.met(dense) + sum(routers.values()) + routing.routers,
        head_weights=0 if head in sparse.values() else math.prod(layer_shapes({"": head})[""]),
        attention_layers=config.layers,
        width=config.heads * FAMILIES[config.family].head_size(config),
        context=config.context,
    )
