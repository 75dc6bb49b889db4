"""What somebody's rule may not do, told in one line that names it, before or instead of doing harm."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from sparsae.config.complaints import shown
from sparsae.config.rules import RuleConfig
from sparsae.core.observation import Captured, LayerView, PastValues
from sparsae.errors import InputError
from sparsae.rules import build_rule
from sparsae.rules.parts.choose import keeps_limits
from sparsae.rules.parts.rule import Candidate, Decision, Rule
from sparsae.search.rows import RESERVED


def as_rule(rule: object) -> Rule[Any]:
    """A rule, or that of its settings. Raises InputError for anything else."""
    if isinstance(rule, RuleConfig):
        return build_rule(rule)
    if not isinstance(rule, Rule):
        raise InputError(f"rule: must be a Rule or the settings of one, such as SetConfig(), not {rule!r}")
    return rule


def refuse_unfit(rule: Rule[Any], has_score: bool) -> None:
    """Raise InputError for a rule that could not be served, or whose state no checkpoint could hold."""
    known = get_args(Captured)
    for need in rule.needs:
        if not isinstance(need, PastValues) and need not in known:
            raise InputError(f"rule '{rule.name}' needs {need!r}: use {', '.join(known)} or PastValues(n)")
    losses = rule.needs & {"loss", "candidate_gradient"}
    if losses and not rule.terms:
        raise InputError(f"rule '{rule.name}' needs '{min(map(str, losses))}', but has no terms that it is scored by")
    for term in rule.terms:
        if missing := term.needs - rule.needs:
            raise InputError(f"rule '{rule.name}' has the term '{term.name}': add {set(missing)} to the rule's needs")
        if not all(isinstance(getattr(term, name, None), str) for name in ("label", "unit")):
            raise InputError(f"term '{term.name}' has no label or no unit, which reports show: give it both")
    if losses and not has_score:
        raise InputError(
            f"rule '{rule.name}' compares candidates by their loss: give Sparsifier a score function (a run has one "
            "where the rule has a micro_batch)"
        )
    refuse_lossy(rule, rule.initial_state())


def refuse_lossy(rule: Rule[Any], state: Any) -> None:
    """Raise InputError for a rule's state that a checkpoint would not give back as it is."""
    try:
        again = rule.state_from_dict(json.loads(json.dumps(saved(state))))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise InputError(f"rule '{rule.name}': its state cannot be saved as JSON and read again: {error}") from None
    if not _is_same(again, state):
        raise InputError(
            f"rule '{rule.name}': its state is {shown(again)} after JSON, and was {shown(state)}: keep numbers, texts "
            "and lists in it, or give the rule a state_from_dict that makes it what it was"
        )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two states are equal: a list is no tuple, and a number that is none is equal to itself."""
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(_is_same(getattr(one, n), getattr(other, n)) for n in names)
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping) and one.keys() == other.keys() and all(_is_same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other or (one != one and other != other))


def saved(state: Any) -> Any:
    """A rule's state as it is after JSON, tuples as lists."""
    return _plain(dataclasses.asdict(state))


@contextmanager
def named(rule: Rule[Any], step: int) -> Iterator[None]:
    """Whatever a rule raises says whose it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, AttributeError | TypeError) and "NoneType" in str(error):
            needs = ", ".join(sorted(map(str, rule.needs))) or "nothing"
            error.add_note(f"what a rule does not declare in its needs is None; '{rule.name}' declares {needs}")
        error.add_note(f"raised by rule '{rule.name}' at the update of step {step}")
        raise


def validated(rule: Rule[Any], candidates: Any, views: Mapping[str, LayerView]) -> list[Candidate]:
    """A rule's candidates, those rejected that leave bounds or limits. Raises InputError for what is no proposal."""
    if not isinstance(candidates, Sequence) or not all(isinstance(each, Candidate) for each in candidates):
        raise InputError(f"rule '{rule.name}': ask() must return a list of Candidate, not {type(candidates).__name__}")
    return [_validated(rule, candidate, views) for candidate in candidates]


def chosen(rule: Rule[Any], decision: Any, candidates: Sequence[Candidate]) -> Decision:
    """A rule's decision. Raises InputError for one that takes no candidate, or one that is out of the race."""
    if not isinstance(decision, Decision):
        raise InputError(f"rule '{rule.name}': tell() must return a Decision and a state, not {decision!r}")
    index = decision.chosen
    if index is not None and (index not in range(len(candidates)) or candidates[index].rejected):
        raise InputError(f"rule '{rule.name}' chose candidate {index}, which is none or was rejected")
    if index is not None and candidates[index].is_probe:
        raise InputError(f"rule '{rule.name}' chose candidate {index}, which is a probe: one to learn from alone")
    _refuse_taken(rule, "a note of its decision", decision.notes)
    return decision


def in_force(rule: Rule[Any], state: Any, progress: float) -> dict[str, float]:
    """A rule's telemetry. Raises InputError for a name that rows have already."""
    found = rule.telemetry(state, progress)
    _refuse_taken(rule, "its telemetry", found)
    return found


def _refuse_taken(rule: Rule[Any], what: str, found: Mapping[str, float]) -> None:
    if taken := sorted(found.keys() & RESERVED):
        raise InputError(f"rule '{rule.name}': {what} cannot be called '{taken[0]}': rows have that already")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _validated(rule: Rule[Any], candidate: Candidate, views: Mapping[str, LayerView]) -> Candidate:
    swap = candidate.swap
    for name, units in [*swap.drop.items(), *swap.grow.items()]:
        if name not in views:
            raise InputError(f"rule '{rule.name}' moves connections of {name!r}, which is no layer that it sees")
        if not isinstance(units, Tensor) or units.dim() != 1 or units.dtype not in (torch.int32, torch.int64):
            raise InputError(f"rule '{rule.name}': units of {name} must be a vector of int32 or int64 unit numbers")
    if swap.shrinks and not rule.prunes:
        says = "shrinks" if swap.shrinks > 0 else "enlarges"
        raise InputError(f"rule '{rule.name}' does not prune (prunes is False), but a swap of it {says} the model")
    if candidate.rejected or keeps_limits(views, swap):
        return candidate
    return dataclasses.replace(candidate, rejected="bounds")
