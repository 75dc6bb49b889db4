"""Transformers' `Conv1D`: a linear layer whose weight is (in, out)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsae.nn.kinds.kind import KINDS, Kind


@KINDS.register
@dataclass(frozen=True)
class Conv1D(Kind):
    """y = x W + b."""

    is_linear = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        # Without importing transformers: a model that has a Conv1D has imported it.
        transformers = sys.modules.get("transformers.pytorch_utils")
        return transformers is not None and type(module) is transformers.Conv1D

    @classmethod
    def outputs(cls, module: nn.Module) -> int:
        return int(module.nf)  # type: ignore[arg-type]

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        return cls()

    def split(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        return {"": tensor.T}

    def join(self, weight: str, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices[""].T

    def weight_shape(self, matrix: tuple[int, int]) -> tuple[int, ...]:
        return matrix[1], matrix[0]

    def release(self, twin: Any) -> nn.Module:
        from transformers.pytorch_utils import Conv1D as Dense

        with torch.device("meta"):
            dense = Dense(twin.out_features, twin.in_features)
        dense.bias = twin.bias
        return dense
