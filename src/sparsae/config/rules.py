"""What the settings of every topology rule, and of every term of a score, have in common.

Their own are in their own files (`sparsae.rules`, `sparsae.terms`).
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from sparsae.config.complaints import SettingError, within
from sparsae.config.effect import Idle
from sparsae.config.section import LARGEST, Count, NonNegative, Positive, Section, near
from sparsae.config.span import RampSpan, Span
from sparsae.errors import InputError
from sparsae.registry import RULES, Registry

_NO_BURN_IN = Idle(lambda burn_in, _: burn_in.steps == 0, "burn_in.steps is 0")


def evolves(rule: Any, number: str) -> bool:
    """Whether a setting is a gene of the rule's strategy, so that its own value is the first genome's alone."""
    strategy = getattr(rule, "strategy", None)
    return strategy is not None and strategy.fitness != "none" and number in strategy.genes


StartSparsity = Annotated[float, Field(ge=0.0, lt=1.0)]

# Settings of every rule that grows by gradients.
GradientWindow = Annotated[
    Span,
    Field(description="growth gradients are averaged over the last steps before an update: steps, 5%, 1 epoch; 1: one"),
]
WindowEvery = Annotated[
    Count,
    Idle(lambda rule, _: rule.window == 1 and not evolves(rule, "window"), "window is one step"),
    Field(description="every n-th step of the window is averaged"),
]
RandomShare = Annotated[
    float, Field(ge=0.0, lt=1.0, description="share of the growth that is uniformly random, not by gradient")
]


class RuleConfig(Section):
    """The settings of a rule: a class of its own for each, to which registering it gives the rule's name.

    A rule that prunes has a field `start_sparsity` and ends at the model's sparsity; every other one keeps that.
    """

    registered_name: ClassVar[str] = ""

    rule: str = Field(default="", description="which rule drops and grows connections")
    ramp: RampSpan = Field(
        default=0,
        description="over how long a grown connection's learning rate rises to that of all others: steps, 5%, "
        "2 updates (as long as two updates lie apart); 0: no ramp",
    )
    ramp_first: Annotated[bool, Idle(lambda rule, _: not rule.ramp, "ramp is 0")] = Field(
        default=False, description="the first connections' learning rates ramp as well"
    )

    @model_validator(mode="before")
    @classmethod
    def _has_its_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = data.get("rule", cls.registered_name)
        if given != cls.registered_name:
            raise ValueError(f"rule must be {cls.registered_name}, not {given}")
        return {**data, "rule": given}

    @property
    def first_sparsity(self) -> float | None:
        """Sparsity of the untrained model, of a rule that prunes; None: that of the whole run."""
        start = getattr(self, "start_sparsity", None)
        return None if start is None else float(start)


class TermConfig(Section):
    """The settings of a term of a score: a class of its own for each, to which registering it gives the term's name."""

    registered_name: ClassVar[str] = ""

    weight: NonNegative = Field(default=1.0, description="weight of the term; 0: it is only recorded")


class BurnInConfig(Section):
    """Steps right after an update in which new weights learn faster, or alone."""

    steps: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        default=0, description="N_burn_in, steps after an update that changed the topology; 0: none"
    )
    multiplier: Annotated[Positive, _NO_BURN_IN] = Field(
        default=1.5, description="learning rate of new connections in terms of the base learning rate"
    )
    scope: Annotated[Literal["new", "all"], _NO_BURN_IN] = Field(
        default="all", description="what learns: new connections alone, or all, the new ones at the multiplied rate"
    )


class MicroBatchConfig(Section):
    """The held-out sequences that score candidates; all candidates of one update see the same ones."""

    mode: Literal["static", "resampled", "pooled"] = Field(
        default="resampled", description="one batch for the run, a new one an update, or one of a pool"
    )
    sequences: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="sequences in a micro-batch")
    pool: Annotated[int, Field(ge=1, le=4096), Idle(lambda batch, _: batch.mode != "pooled", "mode is not pooled")] = (
        Field(default=8, description="micro-batches in the pool (pooled)")
    )
    study: bool = Field(
        default=False,
        description="also score candidates on all validation text, to compare; counted apart from training",
    )

    @property
    def fixed(self) -> int:
        """How many micro-batches a run has; 0: a new one at each update."""
        return {"static": 1, "pooled": self.pool, "resampled": 0}[self.mode]


def require_order(start: float, stop: float) -> None:
    """For validators. Raises ValueError unless `start` comes before `stop`."""
    if start >= stop:
        raise SettingError(f"start {start:g} must come before stop {stop:g}", "start", "stop")


def default_rule() -> RuleConfig:
    """The settings of the rule that a run has where nothing else is said."""
    return RULES["generations"].settings()


def _of_its_rule(data: Any) -> Any:
    """Settings as a mapping, validated by the class that their rule registered."""
    return settings_of(RULES, data.get("rule", "generations"), data) if isinstance(data, dict) else data


def settings_of(registry: Registry, name: Any, data: Any) -> Any:
    """For validators: a mapping as the settings that were registered under a name; anything else as it is.

    Raises ValueError where it cannot be that.
    """
    try:
        settings = registry[str(name)].settings
        if isinstance(data, Section) and not isinstance(data, settings):
            raise InputError(f"{name}: {type(data).__name__} is no settings of {registry.kind} '{name}'")
        return settings.model_validate(data) if isinstance(data, dict) else data
    except InputError as error:
        raise ValueError(str(error)) from None
    except ValidationError as errors:
        raise within(errors, partial(near, settings)) from None


AnyRule = Annotated[SerializeAsAny[RuleConfig], BeforeValidator(_of_its_rule)]
AnyTerm = SerializeAsAny[TermConfig]
