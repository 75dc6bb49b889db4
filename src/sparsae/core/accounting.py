"""What training costs: floating-point operations and bytes, counted analytically.

A product with n active weights costs 2 n operations a token. Attention costs 4 T d a token and layer for sequences of T
tokens (scores and weighted values, over the whole square: what is masked by causality is counted). Lookups, norms,
activations, softmaxes, the optimizer and the average, all linear in their tensors, are not counted. A backward pass
costs twice its forward pass; what a kernel computes twice to save memory, as the fused MLP its hidden layer, counts
once, so that counts are the same for every backend. Of experts, those count that a token is sent to; all of them have
memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = ("student", "teacher", "search", "dense_gradients")


@dataclass(frozen=True)
class ModelCost:
    """Sizes that fix a language model's cost: weights of the layers that are sparse, of dense ones, of the head.

    sparse_weights counts every position, active or not; met_weights those of them that a token meets. dense_weights and
    the active ones that are given are such that it meets. width is that of attention (heads times head size).
    """

    sparse_weights: int
    met_weights: int
    dense_weights: int
    head_weights: int
    attention_layers: int
    width: int
    context: int

    def linear(self, nnz: int, tokens: int) -> int:
        """Forward products with weights, `nnz` of the sparse layers' weights being active."""
        return 2 * tokens * (nnz + self.dense_weights + self.head_weights)

    def attention(self, tokens: int) -> int:
        """Forward attention scores and values."""
        return 4 * self.context * self.width * self.attention_layers * tokens

    def forward(self, nnz: int, tokens: int) -> int:
        """A forward pass with its logits."""
        return self.linear(nnz, tokens) + self.attention(tokens)

    def training(self, nnz: int, tokens: int) -> int:
        """A forward and a backward pass."""
        return 3 * self.forward(nnz, tokens)

    def scoring(self, nnz: int, tokens: int, with_gradient: bool) -> int:
        """A candidate's forward pass and, where asked, the backward pass to the active values and nothing else."""
        cost = self.forward(nnz, tokens)
        if with_gradient:
            cost += self.linear(nnz, tokens) + 2 * tokens * nnz + 2 * self.attention(tokens)
        return cost

    def dense_training(self, tokens: int) -> int:
        """A forward and a backward pass of the same model with every weight."""
        return self.training(self.met_weights, tokens)


def gradient_at(weights: int, tokens: int) -> int:
    """The gradient at `weights` positions of a weight, active or not."""
    return 2 * weights * tokens


@dataclass
class FlopCounter:
    """Exact totals by part of the training; `study` is what was computed to look at it, and no part of it."""

    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    dense_equivalent: int = 0
    study: int = 0

    def add(self, part: str, flops: int) -> None:
        """Count operations of one of PARTS."""
        if part not in self.parts:
            raise ValueError(f"unknown part '{part}': use one of {', '.join(PARTS)}")
        self.parts[part] += flops

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, int]:
        """For checkpoints."""
        return {**self.parts, "dense_equivalent": self.dense_equivalent, "study": self.study}

    @classmethod
    def from_dict(cls, data: Mapping[str, int]) -> FlopCounter:
        """From `to_dict`."""
        return cls({part: int(data[part]) for part in PARTS}, int(data["dense_equivalent"]), int(data["study"]))


def dense_state_bytes(weights: int, *, teacher: bool) -> int:
    """Bytes of state of dense float32 weights: value, gradient, two Adam moments, and an average for a teacher."""
    return (20 if teacher else 16) * weights


def estimated_state_bytes(nnz: int, index_bytes: int, *, teacher_weights: int = 0) -> dict[str, int]:
    """Bytes of float32 model state of sparse layers before any update, by part.

    nnz: active weights; index_bytes: of all that says where they are, which a teacher over the student's own topology
    shares; teacher_weights: what a teacher keeps. The optimizer is AdamW with a step count a weight.
    """
    return {
        "values": 4 * nnz,
        "gradients": 4 * nnz,
        "optimizer": 12 * nnz,
        "indices": index_bytes,
        "teacher": 4 * teacher_weights,
    }
