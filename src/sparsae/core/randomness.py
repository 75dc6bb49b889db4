"""Seeds and generators for every random draw, derived from one seed and the purpose of the draw.

No draw depends on how many came before it: a generator belongs to (seed, purpose), where the purpose names what is
drawn and, where it recurs, at which step. So a run that was stopped and resumed draws what an unbroken one draws.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2**63) that is a function of `seed` and `purpose` only, on every machine.

    The types count: the purposes 1 and "1" give different seeds.
    """
    digest = blake2b(repr((int(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A new generator on the CPU, seeded with `derive_seed(seed, *purpose)`."""
    import torch

    return torch.Generator(device="cpu").manual_seed(derive_seed(seed, *purpose))
