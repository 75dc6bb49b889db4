"""Several texts in one: whose turn it is, a pure function of the weights and the number of the turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
import numpy.typing as npt

from sparsae.data.shards import TokenSequence

_ROUNDS, _LEAST = 64, 4096  # of a text that all parts take turns in, at most so many, of so many tokens at least


@dataclass(frozen=True, eq=False)
class Mixture:
    """Tokens of several sources, and the share of the sequences that each gives; the shares add up to 1."""

    parts: tuple[TokenSequence, ...]
    shares: tuple[Fraction, ...]

    @classmethod
    def of(cls, tokens: TokenSequence | Mixture) -> Mixture:
        """One text is a mixture of one."""
        return tokens if isinstance(tokens, Mixture) else cls((tokens,), (Fraction(1),))

    @classmethod
    def weighted(cls, parts: Iterable[TokenSequence], weights: Iterable[float]) -> Self:
        """With weights in any unit."""
        exact = [Fraction(weight) for weight in weights]
        return cls(tuple(parts), tuple(weight / sum(exact) for weight in exact))

    def __len__(self) -> int:
        """Tokens of all sources together."""
        return sum(map(len, self.parts))

    def read(self) -> npt.NDArray[np.int64]:
        """As much of all parts as lets each have its share, held in memory: rounds in which each gives what it has to.

        So any long stretch of it is made of them as the whole is, the first three quarters as well as the last.
        """
        total = min(len(part) / share for part, share in zip(self.parts, self.shares, strict=True))
        sizes = [min(len(part), math.floor(total * share)) for part, share in zip(self.parts, self.shares, strict=True)]
        rounds = max(1, min(_ROUNDS, sum(sizes) // _LEAST))
        return np.concatenate(
            [
                np.asarray(part[size * turn // rounds : size * (turn + 1) // rounds], np.int64)
                for turn in range(rounds)
                for part, size in zip(self.parts, sizes, strict=True)
            ]
        )


def turn_of(shares: Sequence[Fraction], place: int) -> tuple[int, int]:
    """(the part whose turn the `place`-th is, how many turns it had before).

    Of any stretch of turns each part has its share, within one turn for itself and one for each part before it: the
    first has those at which floor(share * turns) steps up, the second has its own in the same way of what the first
    leaves, and so on.
    """
    rest = Fraction(1)
    for part, share in enumerate(shares[:-1]):
        own = share / rest
        before = math.floor(own * place)
        if math.floor(own * (place + 1)) > before:
            return part, before
        place, rest = place - before, rest - share
    return len(shares) - 1, place
