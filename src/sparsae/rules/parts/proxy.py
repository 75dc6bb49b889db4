"""The composite proxy by which candidates are compared; lower is better.

    P = w1 CE + w2 D - w3 A

Its terms are files of their own (`sparsae.terms`): these three, unless others are added to them or they are left out.
Standardized, each term is (x - mean) / deviation over everything scored so far in the run. Annealed, all weights but
that of CE fall to 0 over the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsae.config.complaints import SettingError, below
from sparsae.config.rules import AnyTerm, settings_of
from sparsae.config.section import Section
from sparsae.core.cadence import decayed
from sparsae.registry import TERMS
from sparsae.score import Running, Score, Term, combine

DEFAULTS = ("cross_entropy", "diversity", "activity")


class ProxyConfig(Section):
    """P = w1 CE + w2 diversity - w3 activity, and whatever terms are added; lower is better."""

    terms: dict[str, AnyTerm | None] = Field(
        default={},
        validate_default=True,
        description="what is summed up, by name; those three stay unless one is null, which leaves it out",
    )
    standardize: bool = Field(default=False, description="standardize each term by its running mean and deviation")
    anneal: Literal["none", "linear", "cosine"] = Field(
        default="none", description="how the weights of all terms but the cross entropy fall to 0 over the run"
    )

    @field_validator("terms", mode="before")
    @classmethod
    def _are_of_their_classes(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found = {}
        for name in dict.fromkeys((*DEFAULTS, *given)):
            try:
                found[name] = settings_of(TERMS, name, given.get(name, {}))
            except ValueError as error:
                raise below(name, error) from None
        return found

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not any(self.terms.values()):
            raise SettingError("at least one must be left", "terms")
        return self

    def built(self) -> tuple[Term[Any], ...]:
        """The terms that are not left out."""
        return tuple(TERMS[name].build(config) for name, config in self.terms.items() if config is not None)

    def combined(self, score: Score, terms: Iterable[Term[Any]], running: Running, progress: float) -> float:
        """P of one topology. Raw terms in, `running` already including them."""
        fade = decayed("constant" if self.anneal == "none" else self.anneal, progress)
        return combine(running.standardized(score) if self.standardize else score, terms, fade)
