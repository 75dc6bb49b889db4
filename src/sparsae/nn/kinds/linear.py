"""`nn.Linear`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from sparsae.nn.kinds.kind import KINDS, Kind, subclass_refusal


@KINDS.register
@dataclass(frozen=True)
class Linear(Kind):
    """y = x W^T + b."""

    is_linear = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return subclass_refusal(module, nn.Linear)

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        return cls()

    def split(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        return {"": tensor}

    def join(self, weight: str, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices[""]

    def release(self, twin: Any) -> nn.Module:
        dense = nn.Linear(twin.in_features, twin.out_features, bias=twin.bias is not None, device="meta")
        dense.bias = twin.bias
        return dense
