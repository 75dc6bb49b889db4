"""What of the held-out text is read when.

The last quarter scores candidates, if the rule has any. Of the sequences of the rest, those that validation reads lie
spread over all of it; the test's lie between them, and only the end of a run reads these: a learning rate that was
chosen by the validation loss is not judged by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from sparsae.config.schema import Config
from sparsae.data import evenly_spaced, left_over
from sparsae.data.shards import TokenSequence

_SCORING = 0.25


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows (N, context + 1) of validation and of the test, and the tokens of which micro-batches are drawn."""

    validation: Tensor
    test: Tensor
    scoring: TokenSequence
    divided: bool
    """Whether candidates are scored on a text of their own."""

    @classmethod
    def of(cls, tokens: TokenSequence, config: Config) -> Self:
        """Raises InputError where there is not one sequence. The test is without a row where validation reads all."""
        context, training = config.model.context, config.training
        reported, scoring = split_held_out(tokens, context)
        read = training.validation_sequences
        return cls(
            evenly_spaced(reported, context, read),
            left_over(reported, context, read, training.tested_sequences),
            scoring,
            divided=reported is not scoring,
        )

    def warnings(self, scores: bool) -> Iterator[str]:
        """What is less than it should be, the text being short; scores: candidates are scored."""
        if not self.divided and scores:
            yield "the held-out text is too short to be divided: candidates are scored on the validation text"
        if not len(self.test):
            yield (
                f"validation reads all {len(self.validation):,} held-out sequences, none is left for a test: set "
                "training.validation_sequences lower, or hold out more text"
            )


def split_held_out(tokens: TokenSequence, context: int) -> tuple[TokenSequence, TokenSequence]:
    """(validation and test, micro-batches); both are the whole text where a quarter of it holds no sequence."""
    cut = int(len(tokens) * (1 - _SCORING))
    if len(tokens) - cut < context + 1 or cut < context + 1:
        return tokens, tokens
    return tokens[:cut], tokens[cut:]
