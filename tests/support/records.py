"""Records of runs, made up: one of each class with what a test says of it, and any by hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from sparsae.core.record import decode, field_names
from sparsae.runs.rows import TopologyRow, TrainRow, ValidationRow
from sparsae.runs.summary import Summary
from sparsae.search.rows import AgeRow, CandidateRow
from tests.support.metrics_rows import SUMMARY

R = TypeVar("R")


def train_row(step: int, **more: Any) -> TrainRow:
    row = TrainRow(
        step, tokens=2048 * step, loss=3.0, cross_entropy=3.0, distillation=None, learning_rate=1e-3, gradient_norm=1.0,
        nnz=70_000, density=0.1, burn_in=False, train_flops=step * 10**10, seconds=0.5 * step, tokens_per_second=4096.0,
    )  # fmt: skip
    return dataclasses.replace(row, **more)


def validation_row(step: int, loss: float = 3.0, **more: Any) -> ValidationRow:
    row = ValidationRow(
        step, tokens=2048 * step, loss=loss, perplexity=2.0**loss, teacher_loss=None, train_flops=step * 10**10,
        seconds=0.5 * step,
    )  # fmt: skip
    return dataclasses.replace(row, **more)


def summary_of(**more: Any) -> Summary:
    return decode(Summary, {**SUMMARY, **more}, "a made-up summary")


def candidate_row(score: float, proposer: str = "uniform", **more: Any) -> CandidateRow:
    return dataclasses.replace(CandidateRow(proposer=proposer, swaps=1, terms={}, score=score, rejected=None), **more)


def topology_row(step: int, **more: Any) -> TopologyRow:
    row = TopologyRow(
        step, accepted=False, chosen=None, candidates=(), current=None, numbers={}, nnz=70_000, swaps=0,
        hamming_start=0.0, hamming_last=0.0, itop_rate=0.1, age=AgeRow(mean=0.0, median=0.0, max=0.0), layers={},
        seconds=0.0,
    )  # fmt: skip
    return dataclasses.replace(row, **more)


def records(kind: type[R]) -> st.SearchStrategy[R]:
    """Any record of a class."""
    return _of_type(kind)


def _of_type(hint: Any) -> st.SearchStrategy[Any]:
    if dataclasses.is_dataclass(hint):
        return _of_record(hint)  # type: ignore[arg-type]
    outer, inner = get_origin(hint), get_args(hint)
    if outer is tuple:
        return st.lists(_of_type(inner[0]), max_size=3).map(tuple)
    if isinstance(outer, type) and issubclass(outer, Mapping):
        return st.dictionaries(st.text(max_size=5), _of_type(inner[1]), max_size=3)
    if type(None) in inner:
        return st.none() | _of_type(next(each for each in inner if each is not type(None)))
    if hint is Any:
        return st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    return st.floats() | st.integers() if hint is float else st.from_type(hint)


def _of_record(kind: type[Any]) -> st.SearchStrategy[Any]:
    own, fields = set(field_names(kind)), {}
    for name, hint in get_type_hints(kind).items():
        if name in {field.name for field in dataclasses.fields(kind)}:
            fields[name] = _of_type(hint)
            if name not in own:  # the open one holds no other's keys, nor what tells rows apart
                fields[name] = fields[name].map(
                    lambda more: {key: value for key, value in more.items() if key not in own | {"kind"}}
                )
    if kind is TopologyRow:  # the one that was chosen is there
        fields["chosen"] = st.none()
    return st.builds(kind, **fields)
