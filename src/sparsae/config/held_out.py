"""Which settings decide what a run's losses are of: losses of runs that differ in one of these cannot be compared."""

from __future__ import annotations

from typing import Any

from sparsae.config.data import DataConfig
from sparsae.config.effect import value_of
from sparsae.config.schema import Config

# The text as tokens: all that prepares it, but not the place where it is kept.
OF_TEXT = tuple(f"data.{name}" for name in DataConfig.model_fields if name != "cache")
# Which sequences of it validation and the test read.
OF_SEQUENCES = ("model.context", "training.validation_sequences", "training.test_sequences")
HELD_OUT = (*OF_TEXT, *OF_SEQUENCES)


def held_out(config: Config, settings: tuple[str, ...] = HELD_OUT) -> dict[str, Any]:
    """The values of these settings, by dotted name; of the test's length the number, given or not."""
    values = {name: value_of(config, tuple(name.split("."))) for name in settings}
    return values | {"training.test_sequences": config.training.tested_sequences}
