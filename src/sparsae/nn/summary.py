"""What of a model is sparse, and why the rest is not."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from sparsae.nn.choice import EXCLUDED, Choice, is_linear
from sparsae.nn.kinds.kind import kind_in
from sparsae.nn.linear import SparseLinear
from sparsae.nn.names import below, innermost, modules_by_name

log = logging.getLogger(__name__)

Row = TypeVar("Row")

_NOTE = "_sparsae_choice"
# A model with less than this share of the sparsity that was asked for is not what somebody thinks that it is.
_FAR_BELOW = 0.5


@dataclass(frozen=True)
class SparseRow:
    """A sparse layer: (out, in, kernel dimensions...) and unit in weights, and the unit's name, such as 2:4.

    frozen: its values do not train, so its connections stay. last: it is the last linear layer, which for many models
    is an output head that nothing tells apart. factor: that of its density which `sparsify` was asked for.
    """

    name: str
    shape: tuple[int, ...]
    unit: tuple[int, int]
    unit_name: str
    nnz: int
    frozen: bool
    last: bool
    factor: float = 1.0

    @property
    def density(self) -> float:
        """Active share of its weights."""
        return self.nnz / math.prod(self.shape)

    @property
    def remark(self) -> str:
        """What sets it apart, in words."""
        return ", ".join(word for word, holds in (("frozen", self.frozen), ("last layer", self.last)) if holds)


@dataclass(frozen=True)
class DenseRow:
    """A module with dense parameters of its own; what is tied counts where it comes first."""

    name: str
    kind: str
    weights: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """A model as it was when `summary` looked. asked: what the last `sparsify` was asked for; None: there was none.

    str() is a table, in which layers that differ by a number in their names share a line.
    """

    sparse: tuple[SparseRow, ...]
    dense: tuple[DenseRow, ...]
    asked: float | None

    @property
    def nnz(self) -> int:
        """Active weights of the sparse layers."""
        return sum(row.nnz for row in self.sparse)

    @property
    def weights(self) -> int:
        """All weights of the model, active or not: everything that would be a parameter of the dense model."""
        return self._positions + sum(row.weights for row in self.dense)

    @property
    def sparse_share(self) -> float:
        """Share of all weights that sparse layers have, active or not."""
        return self._positions / self.weights if self.weights else 0.0

    @property
    def sparsity(self) -> float:
        """Share of all weights that are inactive."""
        return (self._positions - self.nnz) / self.weights if self.weights else 0.0

    @property
    def by_reason(self) -> dict[str, int]:
        """Dense weights by the reason why they are, most first."""
        found: dict[str, int] = {}
        for row in self.dense:
            found[row.reason] = found.get(row.reason, 0) + row.weights
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def _positions(self) -> int:
        return sum(math.prod(row.shape) for row in self.sparse)

    def __str__(self) -> str:
        has_factors = any(row.factor != 1.0 for row in self.sparse)
        columns = ["sparse layer", "count", "shape", "unit", "density", *(["factor"] if has_factors else []), "nnz", ""]
        lines = [columns]
        for rows in _alike(self.sparse, lambda row: (_pattern(row.name), row.shape, row.unit_name, row.remark)):
            first, nnz = rows[0], sum(row.nnz for row in rows)
            lines.append(
                [
                    first.name if len(rows) == 1 else _pattern(first.name),
                    str(len(rows)),
                    "x".join(map(str, first.shape)),
                    first.unit_name,
                    _span([row.density for row in rows]),
                    *([_span([row.factor for row in rows])] if has_factors else []),
                    f"{nnz:,}",
                    first.remark,
                ]
            )
        why = [["stays dense because", "weights", "where"]]
        for reason, weights in self.by_reason.items():
            names = list(dict.fromkeys(_pattern(row.name) for row in self.dense if row.reason == reason))
            why.append([reason, f"{weights:,}", ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")])
        tables = [_table(table) for table in (lines, why) if len(table) > 1]
        asked = "" if self.asked is None else f"; {self.asked:.4g} was asked of the layers made sparse"
        totals = (
            f"{self.weights:,} weights, {self.sparse_share:.2%} of them in sparse layers; "
            f"sparsity of all weights {self.sparsity:.4g}{asked}"
        )
        return "\n\n".join([*tables, totals])


def summary(model: nn.Module) -> Summary:
    """What of a model is sparse now, and why the rest is not; print it, or read its rows."""
    modules = modules_by_name(model)
    reasons = Choice().reasons(model)
    factors: dict[str, float] = {}
    for root, module in modules.items():
        choice = vars(module).get(_NOTE)
        if choice is not None:
            reasons |= {below(root, name): why for name, why in choice.reasons(module).items()}
            factors |= {below(root, name): factor for name, factor in choice.factors.items()}
    last = next((module for module in reversed(modules.values()) if is_linear(module)), None)
    sparse, dense, seen = [], [], set()
    for name, module in modules.items():
        numbers = 0
        for parameter in module.parameters(recurse=False):
            is_values = isinstance(module, SparseLinear) and parameter is module.values
            if id(parameter) not in seen and not is_values and not is_lazy(parameter):
                numbers += parameter.numel()
            seen.add(id(parameter))
        if isinstance(module, SparseLinear):
            topology = module.topology
            frozen = not module.values.requires_grad
            sparse.append(
                SparseRow(
                    name,
                    module.shape,
                    topology.unit,
                    module.unit_name,
                    topology.nnz,
                    frozen,
                    module is last,
                    factors.get(name, 1.0),
                )
            )
        if kind_in(module) is not None:
            if numbers:
                dense.append(DenseRow(name, "bias", numbers, "norms and other vectors"))
        elif name in reasons:
            dense.append(
                DenseRow(name, type(module).__name__, numbers, reasons[name] or "not chosen: it could be sparse")
            )
    choice = vars(innermost(model)).get(_NOTE)
    return Summary(tuple(sparse), tuple(dense), None if choice is None else choice.sparsity)


def note(model: nn.Module, choice: Choice) -> None:
    """Keep on a model what it was asked to be, and warn where it is far from that."""
    vars(innermost(model))[_NOTE] = choice
    now = summary(model)
    excluded = now.by_reason.get(EXCLUDED, 0)
    sparsity = now.sparsity * now.weights / (now.weights - excluded)
    if sparsity < _FAR_BELOW * choice.sparsity:
        most = [f"{weights:,} ({reason})" for reason, weights in now.by_reason.items() if reason != EXCLUDED][:2]
        log.warning(
            "%.4g sparsity was asked for, and %.4g is what all weights of the model have: of %s, dense are %s; "
            "print(sparsae.summary(model)) shows all",
            choice.sparsity,
            now.sparsity,
            f"{now.weights:,}",
            " and ".join(most),
        )


def forget(model: nn.Module) -> None:
    """Undo `note`, in the model and in its parts."""
    for module in model.modules():
        vars(module).pop(_NOTE, None)


def _alike(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _span(numbers: Iterable[float]) -> str:
    """The smallest and the largest, or what they both are."""
    ordered = sorted(numbers)
    low, high = f"{ordered[0]:.4g}", f"{ordered[-1]:.4g}"
    return low if low == high else f"{low} to {high}"


def _pattern(name: str) -> str:
    """A name with `*` for its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _table(lines: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    numbers = {i for i, head in enumerate(lines[0]) if head in ("count", "nnz", "weights")}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
